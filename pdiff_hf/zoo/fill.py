"""Several processes fill one zoo: `accelerate launch` starts them, one zoo comes of it."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..errors import ZooError
from ..files import UNFINISHED, check_opens, human_size, is_zoo, own_name, whole
from ..parallel import Saving, from_main, processes, wait_for_everyone
from .store import WeightZoo


MadeNetworks = Sequence[tuple[torch.Tensor, dict[str, Any]]]
# A network file system shows what another host wrote after a while.
SECONDS_TO_SEE = 120.0
PARTS = f"{UNFINISHED}networks"


def fill(
    folder: Path,
    create: Callable[[], WeightZoo],
    num_networks: int,
    unit_size: int,
    make: Callable[[range], MadeNetworks],
    description: str,
) -> WeightZoo:
    r"""
    Fills a zoo up to a number of networks. Networks 0, ..., `unit_size` - 1 are made at once, and so on: which process
    makes them, and how many processes there are, makes no difference. The main process appends to the zoo; the others
    leave what they made in files beside it, which a later run takes over if this one is killed.

    Args:
        folder (`Path`): Of the zoo; where there are several hosts, all of them see it.
        create (`Callable[[], WeightZoo]`): Makes the zoo where there is none.
        num_networks (`int`): How many it shall have.
        unit_size (`int`): How many are made at once.
        make (`Callable[[range], Networks]`): Makes these networks: vectors `[P]` and rows of metadata.
        description (`str`): For the progress bar.
    """
    state = processes()
    # Parts by other names are not ours.
    mark = from_main(lambda: own_name("networks")[:16])
    if state.is_main_process:
        if not is_zoo(folder):  # parts without a zoo are of one that is gone
            shutil.rmtree(folder / PARTS, ignore_errors=True)
        zoo = WeightZoo(folder) if is_zoo(folder) else create()
    wait_for_everyone()
    if not state.is_main_process:
        _wait_for(folder / "zoo.json")
        zoo = WeightZoo(folder)

    def unit_of(index: int) -> range:
        start = index // unit_size * unit_size
        return range(start, min(start + unit_size, num_networks))

    def part_of(unit: range) -> Path:
        return folder / PARTS / f"networks-{unit.start}-to-{unit.stop}-{mark}.safetensors"

    units = [unit_of(index) for index in range(unit_of(len(zoo)).start, num_networks, unit_size)]
    mine = [unit for unit in units[state.process_index :: state.num_processes] if not part_of(unit).exists()]
    wait_for_everyone()  # from here on the main process moves parts

    if not state.is_main_process:
        for unit in mine:
            _write_part(part_of(unit), make(unit))
        wait_for_everyone()
        wait_for_everyone()
        return WeightZoo(folder)

    taken: list[Path] = []

    def take_parts() -> None:
        """Appends what lies ready, as far as it is next."""
        while len(zoo) < num_networks and (part := part_of(unit_of(len(zoo)))).exists():
            _append(zoo, unit_of(len(zoo)), _read_part(part))
            taken.append(part)
        progress.update(len(zoo) - progress.n)

    def flush() -> None:
        zoo.flush()
        while taken:
            taken.pop().unlink()

    saving = Saving(flush)
    description += f" ({human_size(num_networks * zoo.vector_size * zoo.dtype.itemsize)})"
    with zoo, tqdm(total=num_networks, initial=len(zoo), desc=description, unit="network") as progress:
        for unit in mine:
            networks = make(unit)
            if unit.start <= len(zoo):
                _append(zoo, unit, networks)
            else:
                _write_part(part_of(unit), networks)
            take_parts()
            saving.when_due()
        wait_for_everyone()
        while len(zoo) < num_networks:
            _wait_for(part_of(unit_of(len(zoo))))
            take_parts()
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    wait_for_everyone()
    return zoo


def _wait_for(file: Path) -> None:
    """Until a file that was written, maybe on another host, is there."""
    deadline = time.monotonic() + SECONDS_TO_SEE
    while not file.exists():
        if time.monotonic() > deadline:
            raise ZooError(f"{file} is not there: on all hosts, the processes have to see the same folder.")
        time.sleep(0.05)


def _append(zoo: WeightZoo, unit: range, networks: MadeNetworks) -> None:
    # A killed run may have stored the first of them.
    for vector, row in networks[len(zoo) - unit.start :]:
        zoo.append(vector, **row)


def _write_part(file: Path, networks: MadeNetworks) -> None:
    vectors, rows = torch.stack([vector for vector, _ in networks]), json.dumps([row for _, row in networks])
    with whole(file) as temporary:
        save_file({"networks": vectors}, temporary, {"rows": rows})


def _read_part(file: Path) -> MadeNetworks:
    try:
        check_opens(file)
    except OSError as error:
        raise ZooError(f"{file} cannot be opened: {error}.") from error
    try:
        with safe_open(file, "pt") as part:
            return list(zip(part.get_tensor("networks"), json.loads(part.metadata()["rows"]), strict=True))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ZooError(f"{file} is damaged ({error}). Delete it and run the same command again.") from error
