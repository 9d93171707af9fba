"""``python -m jlora COMMAND …``, the same as ``jlora COMMAND …``."""

from jlora.cli import entry

if __name__ == "__main__":
    entry()
