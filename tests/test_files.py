"""Files are written whole or not at all, and folders are what they hold."""

from pathlib import Path

import pytest

from pdiff_hf.errors import PdiffError, WriteError
from pdiff_hf.files import is_pipeline, is_zoo, whole


def write(file: Path, error: BaseException, remedy: str = "") -> None:
    """Writes half of a file before something goes wrong."""
    with whole(file, remedy) as temporary:
        temporary.write_text("half")
        raise error


def test_what_is_written_becomes_the_file_and_its_folder_is_made(tmp_path):
    file = tmp_path / "new" / "file.txt"
    with whole(file) as temporary:
        temporary.write_text("all of it")
        assert not file.exists()
    assert file.read_text() == "all of it"
    assert list(file.parent.iterdir()) == [file]


def test_a_link_where_a_file_is_prepared_is_not_followed(tmp_path):
    file, elsewhere = tmp_path / "folder" / "file.txt", tmp_path / "elsewhere"
    file.parent.mkdir()
    elsewhere.write_text("mine")
    file.with_name("file.txt.part").symlink_to(elsewhere)
    with whole(file) as temporary:
        temporary.write_text("new")
    assert (file.read_text(), file.is_symlink()) == ("new", False)
    assert elsewhere.read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_write_that_is_interrupted_leaves_the_file_as_it_was(tmp_path, error):
    file = tmp_path / "file.txt"
    file.write_text("before")
    with pytest.raises(error):
        write(file, error())
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_write_that_fails_says_what_is_safe(tmp_path):
    with pytest.raises(WriteError, match=r"Cannot write .*file\.txt: \[Errno 28\] full\. The others are safe\."):
        write(tmp_path / "file.txt", OSError(28, "full"), "The others are safe.")
    assert issubclass(WriteError, PdiffError)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_a_zoo_or_a_pipeline_or_neither(zoo, digits_pipeline, tmp_path):
    assert (is_zoo(zoo.folder), is_pipeline(zoo.folder)) == (True, False)
    assert (is_zoo(digits_pipeline), is_pipeline(digits_pipeline)) == (False, True)
    assert not is_zoo(tmp_path / "nothing")
    assert not is_pipeline(tmp_path / "nothing")
