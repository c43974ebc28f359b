"""`python -m pdiff_hf STAGE`, which `accelerate launch -m pdiff_hf STAGE` runs in several processes."""

from .cli import main


main()
