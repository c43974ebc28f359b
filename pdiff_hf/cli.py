"""The `pdiff-hf` command: a name for each stage."""

import importlib
import sys


STAGES = {
    "collect": "train networks and keep their checkpoints in a zoo",
    "train": "learn the distribution of a zoo's networks",
    "generate": "sample networks from a pipeline into a zoo",
    "evaluate": "compare generated networks with those that they were learned from",
    "quickstart": "all of it on scikit-learn's digits",
    "import": "make a zoo of model repositories on the Hub",
    "push": "put a zoo or a pipeline on the Hub",
    "pull": "get a zoo or a pipeline from the Hub",
}


def main() -> None:
    """Runs a stage with the arguments after its name."""
    stage = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if stage in STAGES:
        module, name = ("share", f"{stage}_main") if stage in ("import", "push", "pull") else (stage, "main")
        getattr(importlib.import_module(f".{module}", __package__), name)(sys.argv[2:])
        return
    lines = ["usage: pdiff-hf STAGE [--config FILE] [arguments]", ""]
    lines += [f"  {name:<11} {purpose}" for name, purpose in STAGES.items()]
    lines += ["", "`pdiff-hf STAGE --help` lists a stage's arguments."]
    if stage in ("-h", "--help"):
        print("\n".join(lines))
    else:
        raise SystemExit(f"pdiff-hf: there is no stage {stage!r}.\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
