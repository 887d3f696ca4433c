"""A folder that appears whole or not at all."""

import os

import pytest

from onnxcompress.deployment.staging import MANIFEST, StagedFolder
from onnxcompress.errors import OutputError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def filled(target, text="new", **wishes):
    with StagedFolder(target, **wishes) as staged:
        (staged.path / MANIFEST).write_text(text)
        staged.commit()


def test_it_appears_when_committed_and_for_everybody_to_read(tmp_path):
    with StagedFolder(tmp_path / "out") as staged:
        (staged.path / "a").write_text("a")
        assert not (tmp_path / "out").exists()
        staged.commit()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a"]
    (tmp_path / "plain").mkdir()
    assert os.stat(tmp_path / "out").st_mode == os.stat(tmp_path / "plain").st_mode


def test_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / "out").mkdir()
    filled(tmp_path / "out")
    assert names(tmp_path / "out") == [MANIFEST]


def test_without_commit_nothing_is_left(tmp_path):
    with StagedFolder(tmp_path / "out") as staged:
        (staged.path / "a").write_text("a")
    assert names(tmp_path) == []


def test_only_a_deployment_is_replaced_and_only_by_force(tmp_path):
    filled(tmp_path / "out", "old")
    with pytest.raises(OutputError, match="--force replaces it"):
        StagedFolder(tmp_path / "out")
    filled(tmp_path / "out", force=True)
    assert (tmp_path / "out" / MANIFEST).read_text() == "new" and names(tmp_path) == ["out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(OutputError, match="not empty"):
            StagedFolder(tmp_path / "other", force=force)


def test_what_is_deployed_is_not_replaced_by_it(tmp_path):
    filled(tmp_path / "out")
    with pytest.raises(OutputError, match=r"m\.onnx, which is deployed, lies in it"):
        StagedFolder(tmp_path / "out", force=True, sources=(tmp_path / "out" / "m.onnx",))


def test_what_came_in_between_stays(tmp_path):
    with StagedFolder(tmp_path / "out") as staged:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
        with pytest.raises(OutputError, match="not empty"):
            staged.commit()
    assert names(tmp_path / "out") == ["mine"] and names(tmp_path) == ["out"]


def test_files_links_and_missing_folders_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for target, words in (("file", "a file or a link"), ("link", "a file or a link"), ("no/out", "No such file")):
        with pytest.raises(OutputError, match=words):
            StagedFolder(tmp_path / target)
