"""``python -m hotport``."""

from hotport.cli import main

main()
