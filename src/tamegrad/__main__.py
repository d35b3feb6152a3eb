"""`python -m tamegrad` is the command `tamegrad`."""

from tamegrad.cli import main

if __name__ == "__main__":
    main()
