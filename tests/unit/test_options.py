"""Mount options: what is accepted, handed on, dropped and refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mxfs_proto.errors import MisuseError
from mxfsd.options import RUN_ROOT_ENV, STATE_MAX, MountOptions, parse


def test_empty_string_gives_the_defaults() -> None:
    assert parse("") == MountOptions()
    assert parse("defaults") == MountOptions()


def test_own_options_are_parsed() -> None:
    options = parse("iface=eth1,port=7000,multicast=239.1.2.3,ro,timeouts=fast,node=alpha,state=/run/x,log=debug")
    assert options == MountOptions(
        read_only=True,
        iface="eth1",
        port=7000,
        multicast="239.1.2.3",
        timeouts="fast",
        node="alpha",
        state="/run/x",
        log="debug",
    )


def test_several_peers_in_either_spelling() -> None:
    assert parse("peer=10.0.0.1,10.0.0.2,ro").peers == ("10.0.0.1", "10.0.0.2")
    assert parse("peer=10.0.0.1,peer=fe80::1").peers == ("10.0.0.1", "fe80::1")


def test_an_address_that_follows_no_peer_is_unknown() -> None:
    with pytest.raises(MisuseError, match=r"unknown option 10\.0\.0\.2"):
        parse("peer=10.0.0.1,ro,10.0.0.2")


def test_what_fstab_and_mount_say_is_accepted() -> None:
    words = "rw,noauto,user,_netdev,nofail,x-systemd.requires=iscsi.service,nodev,nosuid,noexec,noatime"
    assert parse(words).kernel == ("nodev", "nosuid", "noexec", "noatime")


@pytest.mark.parametrize(
    ("text", "kernel"),
    [("noexec,exec", ()), ("exec,noexec", ("noexec",)), ("nodev,nosuid,dev", ("nosuid",))],
)
def test_a_later_option_overrides_an_earlier_one(text: str, kernel: tuple[str, ...]) -> None:
    assert parse(text).kernel == kernel
    assert not parse("ro,rw").read_only
    assert parse("port=1,port=2").port == 2


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("colour=red", "unknown option colour=red; known are ro, rw, localflocks, passthrough, iface="),
        ("rw,logbufs=8", "unknown option logbufs=8"),
        ("ro=1", "unknown option ro=1"),
        ("noexec=1", "unknown option noexec=1"),
        ("iface", "iface needs a value"),
        ("iface=", "iface needs a value"),
        ("iface=averyverylongname", "iface=averyverylongname"),
        ("iface=a/b", "iface=a/b"),
        ("port=0", "port=0"),
        ("port=65536", "port=65536"),
        ("port=x", "port=x"),
        ("port=²", "port=²"),
        ("multicast=10.0.0.1", "multicast=10.0.0.1: not a multicast"),
        ("multicast=me", "multicast=me: not an IPv4"),
        ("broadcast=fe80::1", "broadcast=fe80::1: only IPv4"),
        ("peer=somehost", "peer=somehost: not an IPv4"),
        ("peer=10.0.0.1,broadcast=10.0.0.255", "broadcast and peer exclude each other"),
        ("timeouts=slow", "timeouts=slow: must be one of fast, default, patient"),
        ("fencing=none", "fencing=none: must be one of auto, pr, lease"),
        ("log=loud", "log=loud"),
        ("channel=tin", "channel=tin: must be one of native, pyfuse3"),
        ("channel=pyfuse3", "channel=pyfuse3 keeps file locks on each node alone: say localflocks too"),
        ("channel=pyfuse3,localflocks,passthrough", "passthrough needs a channel of our own"),
        ("localflocks=1", "unknown option localflocks=1"),
        ("node=" + "n" * 65, "node=nnn"),
        ("node=a/b", "node=a/b"),
        ("watchdog=watchdog0", "watchdog=watchdog0: must be the absolute path"),
        ("metrics", "metrics needs a value"),
        ("metrics=0", "metrics=0: must be PORT or ADDR:PORT, with a port from 1 to 65535"),
        ("metrics=65536", "metrics=65536: must be PORT"),
        ("metrics=999999999999", "metrics=999999999999: must be PORT"),
        ("metrics=²", "metrics=²: must be PORT"),
        ("metrics=10.0.0.1", "metrics=10.0.0.1: must be PORT or ADDR:PORT"),
        ("metrics=10.0.0.1:", "metrics=10.0.0.1:: must be PORT or ADDR:PORT"),
        ("metrics=:9100", "metrics=:9100: nothing is not an IPv4 address, nor an IPv6 address in brackets"),
        ("metrics=host:9100", "metrics=host:9100: host is not an IPv4 address"),
        ("metrics=::1:9100", "metrics=::1:9100: an IPv6 address, and no other, stands in brackets"),
        ("metrics=[10.0.0.1]:9100", "metrics=[10.0.0.1]:9100: an IPv6 address, and no other, stands in brackets"),
        ("metrics=[::1:9100", "metrics=[::1:9100: an IPv6 address, and no other, stands in brackets"),
        ("metrics=[::1]", "metrics=[::1]: must be PORT or ADDR:PORT"),
        ("state=run", "state=run: must be an absolute path"),
        ("state=/" + "d" * STATE_MAX, f"longer than {STATE_MAX} bytes"),
    ],
)
def test_a_bad_option_is_named_in_one_line(text: str, names: str) -> None:
    with pytest.raises(MisuseError) as caught:
        parse(text)
    assert names in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sloppy_ignores_only_what_is_unknown() -> None:
    assert parse("colour=red,ro", sloppy=True).read_only
    with pytest.raises(MisuseError):
        parse("port=x", sloppy=True)


def test_run_dir_follows_state_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_ROOT_ENV, raising=False)
    assert parse("").run_dir("abc") == "/run/mxfs/abc"
    monkeypatch.setenv(RUN_ROOT_ENV, "/run/other")
    assert parse("").run_dir("abc") == "/run/other/abc"
    assert parse("state=/tmp/s").run_dir("abc") == "/tmp/s/abc"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("9100", ("127.0.0.1", 9100)),
        ("0.0.0.0:9100", ("0.0.0.0", 9100)),
        ("10.1.2.3:1", ("10.1.2.3", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("[FE80::0:1]:9100", ("fe80::1", 9100)),
    ],
)
def test_where_metrics_are_served(text: str, where: tuple[str, int]) -> None:
    options = parse(f"metrics={text}")
    assert options.metrics == where
    assert parse(options.to_string()) == options
    assert parse("").metrics is None


_name = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=12)
_flags = st.lists(st.sampled_from(["nodev", "nosuid", "noexec", "noatime", "sync"]), unique=True).map(tuple)


@given(
    st.builds(
        MountOptions,
        read_only=st.booleans(),
        iface=st.none() | _name,
        port=st.none() | st.integers(1, 65535),
        peers=st.lists(st.ip_addresses().map(str), max_size=3).map(tuple),
        timeouts=st.sampled_from(["fast", "default", "patient"]),
        node=st.none() | _name,
        metrics=st.none() | st.tuples(st.ip_addresses().map(str), st.integers(1, 65535)),
        watchdog=st.none() | _name.map(lambda name: "/dev/" + name),
        state=st.none() | _name.map(lambda name: "/" + name),
        local_flocks=st.just(True),
        channel=st.sampled_from(["", "native", "pyfuse3"]),
        log=st.sampled_from(["debug", "info", "warning", "error"]),
        kernel=_flags,
    )
)
def test_the_string_form_parses_to_the_same_record(options: MountOptions) -> None:
    assert parse(options.to_string()) == options


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        assert isinstance(parse(text), MountOptions)
    except MisuseError as error:
        assert str(error)
