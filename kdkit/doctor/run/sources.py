"""Where what the checks know is from, if more than one of them names it."""

POST_MORTEMS = "post-mortems of two research projects"
