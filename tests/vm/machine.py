"""One guest: a QEMU process, its power, its network, its clock."""

import subprocess
import time
from contextlib import suppress
from pathlib import Path

from channel import Channel, GuestError
from image import CHECKOUT, Boot
from netspace import NetSpace
from qmp import Qmp

BOOT_S = 150.0
"""Without hardware help a guest takes 15 to 30 s on a machine that does nothing else, three at once twice that."""
END_S = 20.0
_NICE = -10
"""A guest is a machine of its own: what else runs on this one must not make its deadlines pass."""
_CPU = "qemu64"
"""With all that QEMU can emulate (max) the guest uses wide vectors, which cost more here than they save: boot 24 s
against 16 s, sha256 6.6 s against 2.9 s."""
_KERNEL_WORDS = (
    "console=ttyS0 panic=-1 loglevel=5 net.ifnames=0 mitigations=off nokaslr audit=0 apparmor=0 selinux=0 "
    "random.trust_cpu=on no_timer_check nowatchdog cryptomgr.notests"
)


class Machine:
    """Guest number *number*: ``power_on`` starts it, ``wait_up`` waits until it takes commands."""

    init = "init"
    """Its first process, of tests/vm/guest."""
    words = ""
    """More for the kernel's command line."""

    def __init__(
        self,
        number: int,
        folder: Path,
        boot: Boot,
        space: NetSpace,
        wire_port: int,
        *,
        name: str = "",
        disks: tuple[Path, ...] = (),
        forward: str = "",
    ) -> None:
        """Nothing runs yet.

        *wire_port* 0: it is not on the guests' network. *disks* are /dev/vdb and on. *forward*: a port of the namespace
        that leads to it, as QEMU's hostfwd= wants it.
        """
        self.number = number
        self.name = name or f"n{number}"
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.console = folder / "console.log"
        self.booted_s = 0.0
        self.paused = False
        self._boot = boot
        self._space = space
        self._wire_port = wire_port
        self._disks = disks
        self._forward = forward
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._qmp: Qmp | None = None
        self._began = 0.0

    @property
    def channel(self) -> Channel:
        """The way in. GuestError while it is off."""
        if self._channel is None:
            raise GuestError(f"{self.name} is off")
        return self._channel

    @property
    def qmp(self) -> Qmp:
        """The monitor. GuestError while it is off."""
        if self._qmp is None:
            raise GuestError(f"{self.name} is off")
        return self._qmp

    @property
    def on(self) -> bool:
        """Whether its QEMU runs."""
        return self._process is not None and self._process.poll() is None

    def power_on(self) -> None:
        """Start it; return at once."""
        assert not self.on
        for name in ("agent", "qmp"):
            (self.folder / name).unlink(missing_ok=True)
        self._began = time.monotonic()
        with open(self.folder / "qemu.log", "ab") as log:
            self._process = subprocess.Popen(
                ["nice", "-n", str(_NICE), *self._space.prefix(), *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        # Where the scheduler groups by session (sched(7), autogroup), nice counts within one; this is for the group.
        with suppress(OSError):
            Path(f"/proc/{self._process.pid}/autogroup").write_text(str(_NICE))

    def _command(self) -> list[str]:
        number, folder, boot = self.number, self.folder, self._boot
        append = f"{_KERNEL_WORDS} init={CHECKOUT}/tests/vm/guest/{self.init} mxfs.checkout={CHECKOUT}"
        append += f" mxfs.python={boot.python} mxfs.modules={boot.modules} mxfs.number={number}{self.words}"
        words = ["qemu-system-x86_64", "-name", f"mxfs-{self.name}", "-machine", "q35", "-accel", "tcg", "-cpu", _CPU]
        words += ["-smp", "1", "-m", "1G", "-nodefaults", "-display", "none", "-no-reboot"]
        words += ["-kernel", str(boot.kernel), "-initrd", str(boot.initramfs), "-append", append]
        words += ["-chardev", f"file,id=console,path={self.console},append=on", "-serial", "chardev:console"]
        for tag in ("/dev/root", "host"):
            name = tag.rpartition("/")[2]
            words += ["-fsdev", f"local,id={name},path=/,security_model=none,readonly=on,multidevs=remap"]
            words += ["-device", f"virtio-9p-pci,fsdev={name},mount_tag={tag}"]
        words += ["-drive", f"file={boot.image},if=none,id=image,format=raw,readonly=on,file.locking=off"]
        words += ["-device", "virtio-blk-pci,drive=image"]
        for index, disk in enumerate(self._disks):
            words += ["-drive", f"file={disk},if=none,id=disk{index},format=raw,cache=none"]
            words += ["-device", f"virtio-blk-pci,drive=disk{index}"]
        words += ["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=mxfs.agent"]
        words += ["-chardev", f"socket,id=agent,path={folder}/agent,server=on,wait=off"]
        words += ["-qmp", f"unix:{folder}/qmp,server=on,wait=off"]
        forward = f",hostfwd={self._forward}" if self._forward else ""
        words += ["-netdev", f"user,id=storage,net=10.0.{number}.0/24,restrict=off{forward}"]
        words += ["-device", f"virtio-net-pci,netdev=storage,id=eth0,mac=52:54:00:00:00:{number:02x}"]
        if self._wire_port:
            words += ["-netdev", f"socket,id=wire,mcast=230.77.0.1:{self._wire_port},localaddr=127.0.0.1"]
            words += ["-device", f"virtio-net-pci,netdev=wire,id=eth1,mac=52:54:00:00:01:{number:02x}"]
        return words

    def wait_up(self) -> None:
        """Wait until it takes commands. GuestError, with its console, when it does not."""
        assert self._process is not None
        try:
            self._channel = Channel(self.name, self.folder / "agent")
            self._qmp = Qmp(self.folder / "qmp")
            left = self._began + BOOT_S - time.monotonic()
            deadline = time.monotonic() + left
            while not self._channel.ready.wait(0.2):
                if self._process.poll() is not None:
                    raise GuestError(f"{self.name}: QEMU ended with {self._process.returncode}")
                if time.monotonic() > deadline:
                    raise GuestError(f"{self.name}: not up within {BOOT_S:.0f} s")
        except (GuestError, OSError) as error:
            raise GuestError(f"{error}\n{self.logs()}") from None
        self.booted_s = time.monotonic() - self._began

    def power_off(self) -> None:
        """Cut its power: nothing that it had in memory survives."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self._process is not None:
            self._process.kill()
            self._process.wait(END_S)
            self._process = None
        self.paused = False

    def pause(self) -> None:
        """Stop its processor, and with it its clocks."""
        self.qmp("stop")
        self.paused = True

    def resume(self) -> None:
        """Let it go on."""
        self.qmp("cont")
        self.paused = False

    def wire(self, up: bool) -> None:
        """Plug the cable of the guests' network in or out. The guest sees the carrier."""
        self.qmp("set_link", name="eth1", up=up)

    def logs(self, lines: int = 60) -> str:
        """Return the last lines of its console and of QEMU's own complaints, for the report of a failed test."""
        parts = []
        for path in (self.console, self.folder / "qemu.log"):
            if path.exists():
                tail = path.read_text(errors="replace").splitlines()[-lines:]
                parts.append(f"--- {self.name} {path.name}\n" + "\n".join(tail))
        return "\n".join(parts)
