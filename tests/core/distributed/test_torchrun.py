"""Ranks that torchrun started know each other: by a private folder on one host, by a secret on several."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import pytest
from torch.distributed import HashStore

from nanoflow.core.config.errors import ConfigError, NanoflowError
from nanoflow.core.distributed.torchrun import SECRET, accept_ranks, join_torchrun, private_folder
from tests.core.sentences import raises_sentence

SOON = 20  # seconds


@pytest.fixture
def two_hosts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What torchrun tells rank 0 of two, each on a host of its own."""
    told = {
        "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }  # fmt: skip
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    return told


def test_several_hosts_need_a_secret(two_hosts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET, raising=False)
    with raises_sentence(ConfigError, "need a secret", "set NANOFLOW_SECRET to the same"):
        join_torchrun(2)


def test_the_secret_is_not_in_the_store(two_hosts: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody can read torchrun's store."""
    store, kept = HashStore(), {}
    monkeypatch.setenv(SECRET, "tell nobody")
    monkeypatch.setattr("torch.distributed.TCPStore", lambda *args, **options: store)

    def put(self: HashStore, key: str, value: str) -> None:
        kept[key] = value
        raise InterruptedError

    monkeypatch.setattr("torch.distributed.PrefixStore.set", put)
    with pytest.raises(InterruptedError):
        join_torchrun(2)
    assert list(kept) == ["driver"]
    assert kept["driver"].isdecimal()


def test_who_does_not_know_the_secret_is_sent_away() -> None:
    with Listener(("127.0.0.1", 0), authkey=b"right") as listener, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept_ranks, listener, 3)

        def come(rank: int, key: bytes = b"right") -> Connection:
            link = Client(listener.address, authkey=key)
            link.send_bytes(b"%d" % rank)
            return link

        ours = [come(2)]
        with pytest.raises(AuthenticationError):
            come(1, b"wrong")
        ours.insert(0, come(1))
        for end, link in zip(ours, accepted.result(SOON), strict=True):
            link.send_bytes(b"yes")
            assert end.recv_bytes() == b"yes"
            link.close()
            end.close()


def test_the_folder_is_private(tmp_path: Path) -> None:
    folder = private_folder(tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert private_folder(tmp_path) == folder
    folder.chmod(0o755)
    with raises_sentence(NanoflowError, str(folder), "a folder of this user alone"):
        private_folder(tmp_path)


def test_a_link_is_no_folder(tmp_path: Path) -> None:
    """Somebody else may have put it there."""
    (tmp_path / "theirs").mkdir(mode=0o700)
    (tmp_path / f"nanoflow-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(NanoflowError, match="a folder of this user alone"):
        private_folder(tmp_path)
