"""`python -m tamegrad` is the command `tamegrad`."""

from tamegrad_command import main

if __name__ == "__main__":
    main()
