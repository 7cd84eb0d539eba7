"""``python -m gim_stagewise.cli``, the same as ``gim-stage``."""

from gim_stagewise.cli import main

main()
