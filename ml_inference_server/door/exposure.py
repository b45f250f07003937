"""One loud line where strangers could come in."""

import ipaddress
import logging

from ml_inference_server.utils.config import Settings

log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Whether an address, or the name localhost, is this machine's own, an IPv4 one inside IPv6 included."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def exposure(settings: Settings) -> str:
    """What whoever reaches the ports can do, in one sentence; empty where that is little."""
    hosts = {"gRPC": settings.server.host, "HTTP": settings.metrics.host}
    open_to = [f"{name} on {host}" for name, host in hosts.items() if not is_loopback(host)]
    tls, auth = settings.server.tls, settings.server.auth
    is_locked = bool(auth.keys_file or tls.client_ca)
    dangers = []
    if not is_locked:
        dangers.append("whoever reaches that can use it: set server.auth.keys_file, or server.tls.client_ca")
    if not tls.cert:
        what = "texts and keys" if auth.keys_file else "texts"
        dangers.append(f"whoever is on the way can read {what}: set server.tls.cert and server.tls.key")
    return f"open to the network: {' and '.join(open_to)}; {'; '.join(dangers)}" if open_to and dangers else ""


def warn_if_open(settings: Settings) -> None:
    if told := exposure(settings):
        log.warning("%s", told)
