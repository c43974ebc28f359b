"""The page of `pdiff-hf play`, as a Space."""

import os

from pdiff_hf.play import page


demo = page(os.environ["PIPELINE"], os.environ.get("TASK"), os.environ.get("ZOO"))

if __name__ == "__main__":
    demo.launch()
