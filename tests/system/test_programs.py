"""Agents that are any program: the promises are the same as for those of the SDK."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from shared.errors import Reason, RoostError
from tests.support.eventually import eventually
from tests.support.mesh import CLOUD, NORTH, Mesh, running_mesh

EXAMPLE = Path(__file__).parents[2] / "examples" / "anything"


def agent(directory: Path, run: str, **files: str) -> Path:
    """One named `any` with this [run] section; `name_ext` is the file name.ext, executable."""
    root = directory / "written"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    (root / "agent.toml").write_text(f'[agent]\nname = "any"\n[run]\n{run}\n')
    for name, text in files.items():
        path = root / name.replace("_", ".")
        path.write_text(text)
        path.chmod(0o755)
    return root


def example(directory: Path, more: str = "") -> Path:
    run = f'command = ["perl", "list.pl"]\nport = 8080\n{more}'
    return agent(directory, run, list_pl=(EXAMPLE / "list.pl").read_text())


def items(reply: str) -> list[str]:
    return [line[2:] for line in reply.splitlines()[1:]]


async def test_state_survives_hibernation_and_the_loss_of_the_node(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH, CLOUD]) as mesh:
        await mesh.deploy(example(tmp_path, 'idle_timeout = "500ms"'))
        async with mesh.client() as client, client.attach("any", "ana") as ana:
            first = await ana.send("grüne Äpfel", turn_id="t-1")
            assert first.text.startswith("ana, your list has 1 items")
            await eventually(lambda: not mesh.occupied("edge-north"), 10.0, "it hibernates")
            second = await ana.send("bread", turn_id="t-2")
            assert items(second.text) == ["grüne Äpfel", "bread"]
            assert second.receipt.resumed_from == "disk"
            again = await ana.send("bread", turn_id="t-2")
            assert (again.text, again.receipt.replayed) == (second.text, True)
            await mesh.nodes["edge-north"].kill()
            elsewhere = await ana.send("bread", turn_id="t-2")
            assert (elsewhere.text, elsewhere.receipt.node) == (second.text, "cloud-1")
            third = await ana.send("list")
            assert items(third.text) == ["grüne Äpfel", "bread"]


# Does what its one message says.
WILD = """
use strict; use warnings; use IO::Socket::INET;
my $server = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => 8080, Listen => 5) or die;
sub note { open my $f, '>>', '/state/notes' or die; print $f "$_[0]\\n"; close $f }
while (my $c = $server->accept) {
    <$c> or next;
    my $n = 0;
    while (my $l = <$c>) { last if $l eq "\\r\\n"; $n = $1 if $l =~ /^Content-Length: (\\d+)/i }
    read $c, my $do, $n;
    if ($do eq 'notes') {
        open my $f, '<', '/state/notes'; my $all = $f ? join '', <$f> : '';
        print $c "HTTP/1.0 200 OK\\r\\n\\r\\n$all";
        next;
    }
    note($do);
    die "out of flour\\n" if $do eq 'die';
    print $c "HTTP/1.0 500 No\\r\\n\\r\\nthe oven is cold" if $do eq 'fail';
    print $c "gibberish\\r\\n\\r\\n" if $do eq 'gibberish';
    sleep 100 if $do eq 'hang';
    print $c "HTTP/1.0 200 OK\\r\\n\\r\\ndone" if $do eq 'work';
    if ($do eq 'slow') { sleep 1; note('slept'); print $c "HTTP/1.0 200 OK\\r\\n\\r\\ndone" }
}
"""


async def test_a_turn_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    run = 'command = ["perl", "wild.pl"]\nport = 8080\nturn_timeout = "1500ms"'
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        await mesh.deploy(agent(tmp_path, run, wild_pl=WILD))
        async with mesh.client() as client, client.attach("any", "ana") as ana:
            await ana.send("work")
            for message, reason, told in (
                ("die", Reason.AGENT_CRASHED, "out of flour"),
                ("fail", Reason.TURN_FAILED, "the oven is cold"),
                ("gibberish", Reason.AGENT_CRASHED, "HTTP"),
                ("hang", Reason.TURN_TIMEOUT, "1.5 s"),
            ):
                with pytest.raises(RoostError) as caught:
                    await ana.send(message)
                assert caught.value.reason is reason
                assert told in f"{caught.value.message} {caught.value.hint}"
                assert (await ana.send("notes")).text == "work\n"


async def test_kill_9_of_the_node_in_the_middle_of_a_turn(tmp_path: Path) -> None:
    run = 'command = ["perl", "wild.pl"]\nport = 8080'
    async with running_mesh(tmp_path / "mesh", [NORTH, CLOUD]) as mesh:
        await mesh.deploy(agent(tmp_path, run, wild_pl=WILD))
        async with mesh.client() as client, client.attach("any", "ana") as ana:
            await ana.send("work")
            turn = asyncio.create_task(ana.send("slow"))
            await asyncio.sleep(0.5)
            await mesh.nodes["edge-north"].kill()
            assert (await turn).receipt.node == "cloud-1"
            assert (await ana.send("notes")).text == "work\nslow\nslept\n"


async def test_a_daemon_that_is_killed_between_turns_goes_on_with_the_same_process(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        await mesh.deploy(example(tmp_path))
        async with mesh.client() as client, client.attach("any", "ana") as ana:
            await ana.send("bread")
            before = _perls(mesh)
            await mesh.between_turns("edge-north")
            mesh.daemon("edge-north").kill()
            assert items((await ana.send("salt", timeout=30.0)).text) == ["bread", "salt"]
            assert _perls(mesh) == before
            assert len(before) == 1


def _perls(mesh: Mesh) -> set[int]:
    return {p.pid for p in mesh.nodes["edge-north"].tree() if p.name() == "perl"}


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ('["no-such-program"]', "no-such-program"),
        ('["sh", "-c", "echo no yeast >&2; exit 3"]', "no yeast"),
        ('["sleep", "100"]', "no connection at port 8080 within 1 s"),
    ],
)
async def test_one_that_does_not_start_says_why(tmp_path: Path, command: str, told: str) -> None:
    run = f'command = {command}\nport = 8080\nstart_timeout = "1s"'
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        await mesh.deploy(agent(tmp_path, run))
        async with mesh.client() as client, client.attach("any", "ana") as ana:
            with pytest.raises(RoostError) as caught:
                await ana.send("hi")
            assert caught.value.reason is Reason.AGENT_START_FAILED
            assert told in f"{caught.value.message} {caught.value.hint}"


# Speaks docs/agent-protocol.md. Core Perl again, run by its #! line.
SPEAKER = """#!/usr/bin/perl
use strict; use warnings; use JSON::PP;
open my $node, '+<&=', $ENV{ROOST_FD} or die "no node: $!\\n";
sub say_it { my $json = encode_json(shift); syswrite $node, pack('N', length $json) . $json }
sub exactly { my $data = ''; while (length $data < $_[0]) {
    sysread($node, $data, $_[0] - length $data, length $data) or exit 0 } $data }
say_it({kind => 'ready'});
while (1) {
    my $turn = decode_json(exactly(unpack 'N', exactly(4)));
    open my $file, '>>', '/state/heard' or die; print $file '.'; close $file;
    my $reply = "$turn->{user} said $turn->{message}, " . (-s '/state/heard');
    say_it({kind => 'delta', id => $turn->{id}, text => 'hm'});
    say_it({kind => 'reply', id => $turn->{id}, text => $reply});
}
"""


async def test_a_program_may_speak_the_protocol_of_the_sdk(tmp_path: Path) -> None:
    async with running_mesh(tmp_path / "mesh", [NORTH]) as mesh:
        await mesh.deploy(agent(tmp_path, 'command = ["./speak.pl"]', speak_pl=SPEAKER))
        async with mesh.client() as client, client.attach("any", "ana") as ana:
            assert (await ana.send("hi")).text == "ana said hi, 1"
            assert (await ana.send("again")).text == "ana said again, 2"
