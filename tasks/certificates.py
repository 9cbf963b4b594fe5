"""One certificate authority on the controller, and from it a certificate for each host and role.

ca.pem and ca.key in the secrets folder are made once. A CA of your own, dropped in there before the
first run, is used instead. With ca.pem alone the certificates are yours, too, and used as they are:
hosts/<host>/<role>.pem and .key, and operator.pem and .key. ca.pem may hold several CAs, all of them
trusted; the one that ca.key belongs to signs.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pyinfra.api.host import Host

from tasks import secrets

CA_LIFE = timedelta(days=3650)
LIFE = timedelta(days=365)
CLOCK_SKEW = timedelta(hours=1)
RENEW_AT = 1 / 3  # renewed when less than this part of its life is left
CA_FILE = "/etc/hashistack/ca.pem"  # on each host

SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
PrivateKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, as PEM."""

    pem: str
    key: str


@dataclass(frozen=True)
class Profile:
    """What a certificate is for: DNS names (the first is the common name), addresses, extended usages."""

    names: tuple[str, ...]
    addresses: tuple[str, ...] = ()
    usages: tuple[x509.ObjectIdentifier, ...] = (SERVER, CLIENT)


def make(where: Path) -> None:
    """Make the CA, unless there is one. Raises secrets.Missing for one that was made and is gone."""
    wanted = {"ca.key": new_key, "ca.pem": lambda: new_ca(secrets.read(where, "ca.key"))}
    if (where / "ca.pem").exists() and "ca.key" not in secrets.made(where):
        del wanted["ca.key"]  # the user's own, which may come without its key
    secrets.make_once(where, wanted)


def ca(where: Path) -> str:
    """What every host trusts, as PEM."""
    return secrets.read(where, "ca.pem") + "\n"


# The CA's rotation (rotate.py): all trust both, all get certificates of the next, all trust that alone.


def begin_rotation(where: Path) -> None:
    """Make the next CA where that is not done yet, and trust it beside the current one."""
    if not (where / "ca.key").exists():
        raise secrets.Missing(f"{where / 'ca.key'} is missing: certificates of your own are yours to replace")
    key, pem = f"ca.key{secrets.NEXT}", f"ca.pem{secrets.NEXT}"
    if not (where / pem).exists():
        secrets.write(where, key, new_key())
        secrets.write(where, pem, new_ca(secrets.read(where, key)))
    if next_ca(where) not in ca(where):
        secrets.write(where, "ca.pem", ca(where) + next_ca(where))


def next_ca(where: Path) -> str:
    """What every host trusts at the end."""
    return secrets.read(where, f"ca.pem{secrets.NEXT}") + "\n"


def certificate(member: Host, role: str) -> Pair:
    """The certificate of a host. role: consul, nomad, registry or haproxy."""
    return issued(secrets.folder(member.data), f"hosts/{member.name}/{role}", profile(member, role))


def operator(where: Path) -> Pair:
    """The controller's own: good for a client only. The hosts do not trust the next CA at once."""
    current = secrets.read(where, "ca.key") if (where / "ca.key").exists() else None
    return issued(where, "operator", Profile(("operator",), usages=(CLIENT,)), current)


def profile(member: Host, role: str) -> Profile:
    """A server's name is what makes a server: a stolen client's certificate must not pass for one."""
    data = member.data
    kind = "server" if "servers" in member.groups else "client"
    name, usages = {
        "consul": (f"{kind}.{data.consul_datacenter}.consul", (SERVER, CLIENT)),
        "nomad": (f"{kind}.{data.nomad_region}.nomad", (SERVER, CLIENT)),
    }.get(role, (role, (SERVER,)))
    addresses = ["127.0.0.1", data.address]
    if role == "haproxy" and data.haproxy_vip:
        addresses.append(data.haproxy_vip)
    return Profile((name, "localhost", member.name), tuple(addresses), usages)


def issued(where: Path, name: str, profile: Profile, ca_key: str | None = None) -> Pair:
    """The pair <name>.pem and <name>.key, made or renewed if it has to be. Raises secrets.Missing."""
    if not (where / "ca.key").exists() and "ca.key" not in secrets.made(where):
        return _read(where, name)
    signer, key = _signer(where, ca_key or secrets.coming(where, "ca.key"))
    if not _holds(where, name, profile, signer):
        fresh = new_key()  # the key first: a pair that does not match is made anew
        secrets.write(where, f"{name}.key", fresh)
        secrets.write(where, f"{name}.pem", sign(fresh, profile, signer, key))
    return _read(where, name)


def _read(where: Path, name: str) -> Pair:
    return Pair(secrets.read(where, f"{name}.pem") + "\n", secrets.read(where, f"{name}.key") + "\n")


def _holds(where: Path, name: str, profile: Profile, signer: x509.Certificate) -> bool:
    """The pair is there, is one, comes from this CA, has this profile, and has enough of its life left."""
    try:
        pair = _read(where, name)
    except secrets.Missing:
        return False
    found = x509.load_pem_x509_certificate(pair.pem.encode())
    try:
        found.verify_directly_issued_by(signer)
    except (InvalidSignature, ValueError, TypeError):
        return False
    same_key = found.public_key() == _load(pair.key).public_key()
    return same_key and _profile(found) == profile and not due(found)


def _profile(found: x509.Certificate) -> Profile:
    alternatives = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return Profile(
        tuple(alternatives.get_values_for_type(x509.DNSName)),
        tuple(str(address) for address in alternatives.get_values_for_type(x509.IPAddress)),
        tuple(found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value),
    )


def due(found: x509.Certificate) -> bool:
    """Whether it is time to renew it."""
    life = found.not_valid_after_utc - found.not_valid_before_utc
    return found.not_valid_after_utc - _now() < life * RENEW_AT


def days_left(pem: str) -> int:
    """Whole days until the first of these certificates ends; negative once it has."""
    found = x509.load_pem_x509_certificates(pem.encode())
    return min((one.not_valid_after_utc - _now()).days for one in found)


def _now() -> datetime:
    return datetime.now(UTC)


def _signer(where: Path, ca_key: str) -> tuple[x509.Certificate, PrivateKey]:
    key = _load(ca_key)
    for one in x509.load_pem_x509_certificates(ca(where).encode()):
        if one.public_key() == key.public_key():
            return one, key
    raise secrets.Missing(f"{where / 'ca.pem'} has no certificate of {where / 'ca.key'}: restore both")


def _load(pem: str) -> PrivateKey:
    key = load_pem_private_key(pem.encode(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise ValueError(f"a key of type {type(key).__name__}: use ECDSA or RSA")
    return key


def new_key() -> str:
    """An ECDSA P-256 key as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def new_ca(key: str) -> str:
    """A self-signed CA. Each has a name of its own, since two are trusted while one replaces the other."""
    private, serial = _load(key), x509.random_serial_number()
    name = _name(f"hashistack CA {serial:x}"[:40])
    usage = _key_usage(key_cert_sign=True, crl_sign=True)
    return (
        _builder(name, name, private, serial, CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(private, hashes.SHA256())
        .public_bytes(Encoding.PEM)
        .decode()
    )


def sign(key: str, profile: Profile, signer: x509.Certificate, signing: PrivateKey) -> str:
    """A certificate for `key`, as PEM."""
    alternatives = [
        *(x509.DNSName(name) for name in profile.names),
        *(x509.IPAddress(ipaddress.ip_address(address)) for address in profile.addresses),
    ]
    builder = _builder(_name(profile.names[0]), signer.subject, _load(key), x509.random_serial_number(), LIFE)
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key())
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(profile.usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(authority, critical=False)
        .sign(signing, hashes.SHA256())
        .public_bytes(Encoding.PEM)
        .decode()
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: PrivateKey, serial: int, life: timedelta
) -> x509.CertificateBuilder:
    now = _now()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _key_usage(**allowed: bool) -> x509.KeyUsage:
    nothing = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return x509.KeyUsage(**nothing | allowed)
