"""Where what the checks know is from, if more than one of them names it."""

POST_MORTEMS = "post-mortems of two research projects"
DISTILLM = "DistiLLM, arXiv:2402.03898"
HINTON = "Hinton et al. 2015, arXiv:1503.02531, section 2"
