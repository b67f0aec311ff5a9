"""Wheels that are as they should be, and others. The rest is in tests/system/test_packages.py."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

import pytest

from edge_agent.jail.unpack import Failed, Target, compile_all, copy_tree, unpack_wheel
from tests.support.wheels import make_wheel


def unpacked(tmp_path: Path, files: dict[str, str], most_bytes: int = 10 << 20, most_files: int = 10) -> Path:
    root = tmp_path / "state"
    unpack_wheel(str(make_wheel(tmp_path, "thing", files)), Target(str(root), most_bytes, most_files))
    return root


def test_its_files_lie_where_they_are_imported_from(tmp_path: Path) -> None:
    root = unpacked(
        tmp_path,
        {
            "thing/__init__.py": "x = 1\n",
            "thing-1.0.data/purelib/other.py": "",
            "thing-1.0.data/scripts/run": "#!python\nprint()\n",
            "thing-1.0.data/headers/x.h": "",
        },
    )
    found = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and "dist-info" not in str(p)}
    assert found == {"thing/__init__.py", "other.py", "bin/run"}
    assert (root / "bin" / "run").stat().st_mode & 0o777 == 0o755
    assert (root / "bin" / "run").read_text().startswith("#!/")


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "a\\..\\x", "."])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(Failed, match="with the name"):
        unpacked(tmp_path, {name: ""})


def test_a_bomb_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="more than"):
        unpacked(tmp_path, {"zeros": "0" * (11 << 20)})
    assert (tmp_path / "state" / "zeros").stat().st_size <= 10 << 20
    with pytest.raises(Failed, match="more than"):
        unpacked(tmp_path, {f"f{i}": "" for i in range(11)})


def test_a_link_in_a_wheel_is_a_file_with_its_target_as_text(tmp_path: Path) -> None:
    path = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        wheel.writestr(link, "/etc/passwd")
    unpack_wheel(str(path), Target(str(tmp_path / "state")))
    assert not (tmp_path / "state" / "link").is_symlink()
    assert (tmp_path / "state" / "link").read_text() == "/etc/passwd"


def test_what_is_compiled_is_used_without_a_look_at_its_source(tmp_path: Path) -> None:
    root = unpacked(tmp_path, {"thing.py": "x = 1\n", "bad.py": "print 1"})
    compile_all(str(root))
    source = root / "thing.py"
    cached = Path(importlib.util.cache_from_source(str(source)))
    assert cached.exists()
    assert int.from_bytes(cached.read_bytes()[4:8], "little") == 0b01, "hash-based, unchecked: PEP 552"
    source.write_text("raise AssertionError\n")
    spec = importlib.util.spec_from_file_location("thing_of_test", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.x == 1


def test_a_tree_is_copied_without_the_links_in_it_to_directories(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "pkg").mkdir(parents=True)
    (tree / "pkg" / "m.py").write_text("x")
    (tree / "loop").symlink_to("..")
    copy_tree(str(tree), Target(str(tmp_path / "state")))
    assert {p.name for p in (tmp_path / "state").rglob("*")} == {"pkg", "m.py"}
