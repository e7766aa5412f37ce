"""The two ways kdkit stops on purpose; the command line maps each to its exit code."""


class UserError(Exception):
    """Bad usage or input: the message says what was given, what is allowed and what to do."""


class RunFailed(Exception):
    """The run itself failed; the message names the stage, the step and what was saved."""
