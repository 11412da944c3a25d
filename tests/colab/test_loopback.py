"""Which hosts are this machine."""

from __future__ import annotations

from sheily_train.colab.loopback import is_loopback


def test_which_hosts_are_this_machine() -> None:
    """A wildcard is not, nor is a name that only begins like one."""
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "", "192.168.1.2", "localhost.evil", "127.1"))
