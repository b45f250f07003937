"""A name server for one name, whose addresses change while clients use them."""

import asyncio
import ipaddress
import struct

_TYPE_A, _CLASS_IN, _HEADER_BYTES = 1, 1, 12
_ANSWER_FLAGS = 0x8580  # an answer, authoritative, no error


class Names(asyncio.DatagramProtocol):
    """Answers each question about IPv4 with `addresses`, and others with none."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self._transport: asyncio.DatagramTransport | None = None

    async def listen(self) -> int:
        """On a free port of 127.0.0.1."""
        self._transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, ("127.0.0.1", 0))
        port: int = self._transport.get_extra_info("sockname")[1]
        return port

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        name_ends = data.index(b"\0", _HEADER_BYTES) + 1
        question, kind = data[_HEADER_BYTES : name_ends + 4], struct.unpack_from(">H", data, name_ends)[0]
        found = self.addresses if kind == _TYPE_A else []
        header = data[:2] + struct.pack(">HHHHH", _ANSWER_FLAGS, 1, len(found), 0, 0)
        # Each answer: the name as the question has it, how long it holds (no time), and four bytes of address.
        answers = [
            struct.pack(">HHHIH", 0xC000 | _HEADER_BYTES, _TYPE_A, _CLASS_IN, 0, 4) + ipaddress.IPv4Address(each).packed
            for each in found
        ]
        if self._transport is not None:
            self._transport.sendto(header + question + b"".join(answers), addr)
