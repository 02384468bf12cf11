"""Write the files of examples that have none yet."""

import sys

import msgspec

from protocol.codec import Codec, encode_record
from protocol.messages import SUBPROTOCOL_JSON, Data
from tests.protocol.golden import FOLDER, examples


def main() -> None:
    """Make what is missing; leave alone what is there."""
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    as_json = Codec(SUBPROTOCOL_JSON)
    for name, value in examples().items():
        kind = name.split(".")[0]
        encodings = {"msgpack": msgspec.msgpack.encode(value)}
        if kind == "frame":
            encodings["json"] = as_json.encode(value)
        elif kind == "record":
            # A record is seen in JSON only inside a DATA frame.
            encodings["json"] = as_json.encode(Data(1, 1, [msgspec.Raw(encode_record(value))]))
        for ending, body in encodings.items():
            path = FOLDER / f"{name}.{ending}"
            if not path.exists():
                path.write_bytes(body)
                print("wrote", path)


main()
