"""`python -m kdkit` is the command `kdkit`, for `accelerate launch -m kdkit`."""

from kdkit.cli import main

main()
