"""`python -m timm_dearkd COMMAND ...`, the same as `timm-dearkd COMMAND ...`."""
from timm_dearkd.cli import main

if __name__ == '__main__':
    main()
