"""Addresses and interfaces, on this machine's own; what needs two nodes is in test_dist_util."""

import os

import pytest

from guided_diffusion import network


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.0.1.1", True), ("localhost", True), ("::1", True), ("10.0.0.3", False), ("n2", False)],
)
def test_loopback(host, loopback):
    assert network.is_loopback(host) == loopback


def test_interfaces():
    assert network.interfaces()["lo"] == "127.0.0.1"
    assert network.address_towards(["127.0.1.1", "localhost", "no such host", ""]) == ""
    assert network.interface_towards(["127.0.1.1"]) == ""
    for name, address in network.interfaces().items():
        if name != "lo":
            assert network.address_towards(["localhost", address]) == address
            assert network.interface_towards([address]) == name


def test_meeting_point():
    assert network.meeting_point({}, [], one_node=True) == "127.0.0.1"
    assert network.meeting_point({"GLOO_SOCKET_IFNAME": "lo,eth7"}, [], one_node=False) == "127.0.0.1"
    for one_node in (True, False):
        assert network.meeting_point({"MASTER_ADDR": "node1"}, [], one_node) == "node1"
    for host in ("127.0.1.1", "localhost"):
        with pytest.raises(ValueError, match=rf"MASTER_ADDR={host}"):
            network.meeting_point({"MASTER_ADDR": host}, [], one_node=False)
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME=eth77"):
        network.meeting_point({"GLOO_SOCKET_IFNAME": "eth77"}, [], one_node=False)


def test_the_users_interface_goes_first(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with network.gloo_interface("lo"):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    with network.gloo_interface(""):
        assert "GLOO_SOCKET_IFNAME" not in os.environ
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    with network.gloo_interface("lo"):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
