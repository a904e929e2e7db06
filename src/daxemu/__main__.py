"""``python -m daxemu``."""

from daxemu.cli.main import main

main(prog_name="daxemu")
