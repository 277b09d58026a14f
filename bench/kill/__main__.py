"""The command of this package."""

from .trials import main

if __name__ == "__main__":
    main()
