"""``python -m diffsteer``."""

from diffsteer.cli import entry

if __name__ == "__main__":
    entry()
