"""``python -m jlora.plan CONFIG.yaml``."""

from jlora import cli

if __name__ == "__main__":
    cli.leave(cli.main("plan"))
