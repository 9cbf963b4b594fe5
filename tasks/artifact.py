"""Install a tool from the artifact mirror: verified on the host, then swapped in by one rename.

The binary is /usr/local/lib/<tool>/<version>/<tool>, with a file `unsigned` beside it where it came
without the publisher's signature; /usr/local/bin/<tool> is a link to the version in use.
"""

from __future__ import annotations

import re
import shlex
import zipfile
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field

from pyinfra import host, logger
from pyinfra.api import FactBase, FileUploadCommand, FunctionCommand, operation
from pyinfra.api.host import Host
from pyinfra.api.state import State
from pyinfra.facts.server import Arch

from tasks import mirror

LIB = "/usr/local/lib"
BIN = "/usr/local/bin"
TOOLS = ("consul", "consul-template", "nomad")
VERSION = r"\d+\.\d+\.\d+[0-9A-Za-z.+-]*"
ARCHES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass
class ToolState:
    """What a host has of a tool; "" where there is none. free: bytes on the disk it lives on."""

    link: str = ""  # where /usr/local/bin/<tool> points
    installed: str = ""  # version that a shell would start, from wherever it was installed
    running: str = ""  # version of the service's process
    present: list[str] = field(default_factory=list)  # versions in LIB
    unsigned: list[str] = field(default_factory=list)  # those of them without a signature
    free: int = 0


class Tools(FactBase[dict[str, ToolState]]):
    """Tool -> ToolState, from links and paths: a binary is asked only if it was installed elsewhere."""

    def command(self) -> str:
        return f"for tool in {' '.join(TOOLS)}; do {_look()}; done"

    def process(self, output: Iterable[str]) -> dict[str, ToolState]:
        states = {tool: ToolState() for tool in TOOLS}
        for line in output:
            tool, what, value = [*line.split(maxsplit=2), ""][:3]
            if what in ("present", "unsigned"):
                getattr(states[tool], what).append(value)
            elif what in ("installed", "running"):
                setattr(states[tool], what, _version_in(value))
            elif what == "free":
                states[tool].free = int(value)
            elif what == "link":
                states[tool].link = value
        return states


def _look() -> str:
    return f"""
        lib={LIB}/$tool
        echo $tool link $(readlink {BIN}/$tool)
        for have in $lib/*/$tool; do
            test -x $have || continue
            version=$(basename $(dirname $have))
            echo $tool present $version
            test ! -e $lib/$version/unsigned || echo $tool unsigned $version
        done
        installed=$(readlink -f "$(command -v {BIN}/$tool || command -v $tool || echo /)")
        running=$(readlink /proc/$(systemctl show -P MainPID $tool)/exe)
        for what in "installed $installed" "running $running"; do
            path=${{what#* }}
            case $path in
                $lib/*) echo $tool $what ;;
                *) test ! -f "$path" || echo $tool ${{what%% *}} $("$path" -version | head -n 1) ;;
            esac
        done
        test -d $lib || lib={LIB}
        echo $tool free $(df -B1 --output=avail $lib | tail -n 1)"""


def _version_in(text: str) -> str:
    """1.14.11 of "/usr/local/lib/consul/1.14.11/consul", or of "Consul v1.14.11"."""
    found = re.search(rf"(?:{LIB}/[^/]+/|\bv)({VERSION})", text)
    return found[1] if found else ""


def older(one: str, other: str) -> bool:
    """Version `one` comes before `other`, as semver.org orders them. "" comes before all."""
    return order(one) < order(other)


def order(version: str) -> tuple[tuple[int, ...], bool, list[tuple[bool, int, str]]]:
    """For sorting, as semver.org orders them."""
    numbers, _, pre = version.partition("+")[0].partition("-")
    parts = [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in pre.split(".")]
    return tuple(int(n) for n in numbers.split(".") if n), not pre, parts


def wanted(member: Host, tool: str) -> str:
    """The version that group_data pins for a tool."""
    return str(member.data.get(f"{tool.replace('-', '_')}_version"))


def _downgrade(member: Host, tool: str, version: str, state: ToolState) -> str | None:
    """Why this version may not be installed here, or None."""
    name = f"{tool.replace('-', '_')}_version"
    if not re.fullmatch(VERSION, version):
        return f"{name} {version}: not a version; give three numbers, such as 1.22.3"
    newest = state.running if older(state.installed, state.running) else state.installed
    if not older(version, newest):
        return None
    return f"{member.name}: {tool} {newest} is newer than {version}; set {name} to {newest} or newer"


def faults(member: Host, tools: Iterable[str]) -> list[str]:
    """What keeps this host from getting its tools, a line each. Fills the mirror, changes no host."""
    states = member.get_fact(Tools)
    return [line for tool in tools if (line := _fault(member, tool, states[tool]))]


def _fault(member: Host, tool: str, state: ToolState) -> str | None:
    version = wanted(member, tool)
    downgrade = _downgrade(member, tool, version, state)
    if downgrade or version in state.present:
        return downgrade
    try:
        artifact = _artifact(member, tool, version)
        needed = _member(artifact).file_size + 2 * artifact.zip.stat().st_size
    except mirror.MirrorError as error:
        return str(error)
    if needed < state.free:
        return None
    return (
        f"{member.name}: {tool} {version} needs {needed / 1e6:.0f} MB in {LIB},"
        f" {state.free / 1e6:.0f} MB are free; free some space"
    )


def unsigned(member: Host) -> list[str]:
    """One line for each tool in use on this host without the publisher's signature."""
    states = member.get_fact(Tools)
    return [
        f"{tool} {state.installed}: local build, unsigned"
        for tool, state in states.items()
        if state.installed in state.unsigned
    ]


def _artifact(member: Host, tool: str, version: str) -> mirror.Artifact:
    arch = ARCHES.get(machine := member.get_fact(Arch))
    if not arch:
        raise mirror.MirrorError(f"{member.name}: no {tool} for {machine}; use amd64 or arm64")
    return mirror.fill(tool, version, arch, str(member.data.artifact_mirror))


@operation()
def install(tool: str, version: str) -> Generator[str | FileUploadCommand | FunctionCommand]:
    """Make /usr/local/bin/<tool> the given version. Restarts nothing.

    What runs, and what ran before, stays on disk: Nomad starts helpers from its own binary's path.
    """
    state = host.get_fact(Tools)[tool]
    binary = f"{LIB}/{tool}/{version}/{tool}"
    if state.link == binary and version in state.present:
        host.noop(f"{tool} {version} is installed")
        return
    newer = _downgrade(host, tool, version, state)
    if newer:
        yield FunctionCommand(_refuse, (newer,), {})
        return
    if version not in state.present:
        yield from _unpack(tool, version)
    yield _swap(tool, version)
    keep = {version, state.installed, state.running} - {""}
    names = " ".join(f"! -name {shlex.quote(name)}" for name in sorted(keep))
    yield f"find {LIB}/{tool} -mindepth 1 -maxdepth 1 {names} -exec rm -rf {{}} +"


def _refuse(state: State, host: Host, line: str) -> bool:
    """Fail in one line; an exception would print a traceback. `faults` says it before, in prepare."""
    logger.error(f"{host.print_prefix}{line}")
    return False


def _unpack(tool: str, version: str) -> Generator[str | FileUploadCommand | FunctionCommand]:
    """Upload, verify and unpack beside the target, which a rename then creates whole."""
    try:
        artifact = _artifact(host, tool, version)
        inflate = _inflate(artifact)
    except mirror.MirrorError as error:
        yield FunctionCommand(_refuse, (str(error),), {})
        return
    new = f"{LIB}/{tool}/.new"
    name = artifact.zip.name
    yield f"rm -rf {new} && install -d -m 755 {LIB}/{tool} {new}"
    yield FunctionCommand(logger.info, (f"{host.print_prefix}upload {name}, {artifact.origin}",), {})
    yield FileUploadCommand(str(artifact.zip), f"{new}/{name}")
    yield (
        f"cd {new} && {{ echo '{artifact.sha256}  {name}' | sha256sum --check --status"
        f" || {{ echo '{name}: wrong sum after the upload; run again' >&2; exit 1; }}; }}"
        f" && {inflate} > {tool} && rm {name} && chmod 755 {tool}"
        f"{'' if artifact.signed else ' && touch unsigned'}"
        f" && sync {tool} && rm -rf ../{version} && mv -T {new} ../{version}"
    )


def _swap(tool: str, version: str) -> str:
    link = f"{BIN}/{tool}"
    return f"ln -sfn {LIB}/{tool}/{version}/{tool} {link}.new && mv -T {link}.new {link}"


def _member(artifact: mirror.Artifact) -> zipfile.ZipInfo:
    try:
        with zipfile.ZipFile(artifact.zip) as archive:
            return archive.getinfo(artifact.tool)
    except (KeyError, zipfile.BadZipFile):
        raise mirror.MirrorError(f"{artifact.zip}: no zip with a file {artifact.tool}") from None


def _inflate(artifact: mirror.Artifact) -> str:
    """A shell command that writes the tool in the verified zip to its stdout.

    A bare Debian host has no unzip, and its python3-minimal no zipfile. But a file in a zip is the same
    deflate stream as in a .gz, and gzip is everywhere: put a gzip header before it, and behind it the
    trailer that gzip checks (CRC and size, both in the zip's directory).
    """
    info = _member(artifact)
    with artifact.zip.open("rb") as file:
        file.seek(info.header_offset + 26)
        lengths = file.read(4)
    start = info.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    stream = f"tail -c +{start + 1} {artifact.zip.name} | head -c {info.compress_size}"
    if info.compress_type == zipfile.ZIP_STORED:
        return stream
    trailer = info.CRC.to_bytes(4, "little") + info.file_size.to_bytes(4, "little")
    octal = "".join(f"\\{byte:03o}" for byte in trailer)
    return rf"{{ printf '\037\213\010\0\0\0\0\0\0\377'; {stream}; printf '{octal}'; }} | gzip -dc"
