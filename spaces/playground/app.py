"""The page of `pdiff-hf play`, as a Space."""

import os

from pdiff_hf.play import serve


if "PIPELINE" not in os.environ:
    raise SystemExit("Set the Space's variable PIPELINE to the name of a model repository with a pipeline.")

serve(os.environ["PIPELINE"], os.environ.get("TASK"), os.environ.get("ZOO"))
