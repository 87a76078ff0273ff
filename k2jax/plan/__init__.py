"""What the compilers for hardware that is not here say of a program."""
