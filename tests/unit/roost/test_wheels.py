"""Which wheels fit which node."""

from __future__ import annotations

import pytest

from shared.errors import Reason, RoostError
from shared.wheels import Platform, Wheel, choose

BOX = Platform((3, 11), "x86_64", (2, 36))
PI = Platform((3, 13), "aarch64", (2, 41))


def test_a_platform_is_written_and_read() -> None:
    for platform in (BOX, PI, Platform((3, 12), "x86_64", (0, 0)), Platform.here()):
        assert Platform.parse(str(platform)) == platform
    assert str(BOX) == "cp311-x86_64-glibc2.36"


@pytest.mark.parametrize(
    "text", ["", "cp311", "cp311-x86_64-glibc2", "cp311-../x-glibc2.36", "cp311-x86_64-glibc2.36 "]
)
def test_what_is_no_platform(text: str) -> None:
    with pytest.raises(ValueError):
        Platform.parse(text)


@pytest.mark.parametrize(
    ("tag", "box", "pi"),
    [
        ("py3-none-any", True, True),
        ("py2.py3-none-any", True, True),
        ("py312-none-any", False, True),
        ("py2-none-any", False, False),
        ("cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64", True, False),
        ("cp311-cp311-manylinux_2_39_x86_64", False, False),
        ("cp311-cp311-musllinux_1_2_x86_64", False, False),
        ("cp313-cp313-manylinux_2_28_aarch64", False, True),
        ("cp313-cp313t-manylinux_2_28_aarch64", False, False),
        ("cp39-abi3-manylinux2014_x86_64", True, False),
        ("cp38-abi3-manylinux_2_28_aarch64", False, True),
        ("cp310-cp310-manylinux2014_x86_64", False, False),
        ("py3-none-manylinux1_x86_64", True, False),
        ("py3-none-linux_aarch64", False, True),
        ("py3-none-win_amd64", False, False),
        ("pp311-pypy311_pp73-manylinux2014_x86_64", False, False),
    ],
)
def test_what_fits(tag: str, box: bool, pi: bool) -> None:
    wheel = Wheel.parse(f"some_thing-1.0-1build-{tag}.whl")
    assert (wheel.fits(BOX), wheel.fits(PI)) == (box, pi)
    assert wheel.name == "some-thing"


def test_the_directory_for_this_kind_of_node_comes_before_all_others() -> None:
    files = {
        "": ["a-1-py3-none-any.whl"],
        "cp311-x86_64": ["b-1-py3-none-any.whl", "README"],
        "cp313-aarch64": [],
    }
    assert choose(files, BOX) == ["cp311-x86_64/b-1-py3-none-any.whl"]


def test_of_several_files_the_compiled_one_that_fits() -> None:
    files = [
        "A.b-1-py3-none-any.whl",
        "a_b-1-cp311-cp311-manylinux2014_x86_64.whl",
        "a_b-1-cp313-cp313-manylinux2014_aarch64.whl",
        "c-2-py3-none-any.whl",
    ]
    assert choose({"": files}, BOX) == [files[1], files[3]]
    assert choose({"": files}, PI) == [files[2], files[3]]


def test_a_directory_without_wheels_is_no_packages() -> None:
    assert choose({"": ["__init__.py"], "x": ["y.py"]}, BOX) == []


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"": ["a-1-cp312-cp312-manylinux2014_x86_64.whl", "b-1-py3-none-any.whl"]}, "a-1-cp312"),
        ({"": [f"a{i}-1-py2-none-any.whl" for i in range(9)]}, "and 4 more"),
        ({"": ["a-1-py3-none-any.whl", "a-2-py3-none-any.whl"]}, "several versions: 1, 2"),
        ({"": ["a.whl"]}, "'a.whl' is not the name of a wheel"),
        (
            {"": [], "cp313-aarch64": ["a-1-py3-none-any.whl"]},
            "and this node is cp311-x86_64",
        ),
    ],
)
def test_what_does_not_fit_is_named(files: dict[str, list[str]], told: str) -> None:
    with pytest.raises(RoostError) as caught:
        choose(files, BOX)
    assert caught.value.reason is Reason.AGENT_PREPARE_FAILED
    assert told in caught.value.message
