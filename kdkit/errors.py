"""The two ways kdkit stops on purpose; the command line maps each to its exit code."""


class OneMessage(Exception):
    """An error whose message says all: a notebook shows it alone, without the path that led to it."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class UserError(OneMessage):
    """Bad usage or input: the message says what was given, what is allowed and what to do."""


class RunFailed(OneMessage):
    """The run itself failed; the message names the stage, the step and what was saved."""
