"""``python -m vapi``: the code of the current folder, whatever is installed. DVC's stages use it for that reason."""

from vapi.cli import main

main()
