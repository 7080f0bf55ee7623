"""For brokers.test: `put` stores something in a broker, `check` succeeds if it is still there.

    keep.py put|check nats|rabbitmq|kafka PORT

Raw protocols, so that the test needs no client library.
"""

import json
import socket
import struct
import sys
import time

NAME = b"kept"


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=20)


# --- NATS: a stream with one message ---------------------------------------------------------------------------------


def nats(put, port):
    wire = connect(port).makefile("rwb")
    wire.readline()
    wire.write(b'CONNECT {"verbose":false}\r\nSUB reply 1\r\n')

    def request(subject, body):
        wire.write(b"PUB %b reply %d\r\n%b\r\n" % (subject, len(body), body))
        wire.flush()
        while not (line := wire.readline()).startswith(b"MSG"):
            assert line and not line.startswith(b"-ERR"), line
        reply = json.loads(wire.read(int(line.split()[-1])))
        assert "error" not in reply, reply
        return reply

    if put:
        stream = {"name": "kept", "subjects": ["kept"], "storage": "file"}
        request(b"$JS.API.STREAM.CREATE.kept", json.dumps(stream).encode())
        request(b"kept", b"x")
    return request(b"$JS.API.STREAM.INFO.kept", b"")["state"]["messages"]


# --- RabbitMQ: a quorum queue with one message, and an exchange of the plug-in --------------------------------------


def short(text):
    return bytes([len(text)]) + text


def long(text):
    return struct.pack(">I", len(text)) + text


def rabbitmq(put, port):
    wire = connect(port).makefile("rwb")

    def frame(kind, channel, body):
        wire.write(struct.pack(">BHI", kind, channel, len(body)) + body + b"\xce")

    def call(channel, method, arguments, expected):
        frame(1, channel, struct.pack(">HH", *method) + arguments)
        return answer(expected)

    def answer(expected):
        wire.flush()
        _, _, size = struct.unpack(">BHI", wire.read(7))
        body = wire.read(size + 1)
        assert struct.unpack(">HH", body[:4]) == expected, body
        return body[4:-1]

    wire.write(b"AMQP\x00\x00\x09\x01")
    answer((10, 10))
    login = long(b"") + short(b"PLAIN") + long(b"\x00guest\x00guest") + short(b"en_US")
    tune = call(0, (10, 11), login, (10, 30))
    frame(1, 0, struct.pack(">HH", 10, 31) + tune)
    call(0, (10, 40), short(b"/") + b"\x00\x00", (10, 41))
    call(1, (20, 10), b"\x00", (20, 11))
    quorum = long(short(b"x-queue-type") + b"S" + long(b"quorum"))
    call(1, (50, 10), b"\x00\x00" + short(NAME) + bytes([0b10 if put else 0b11]) + quorum, (50, 11))
    exchange = short(NAME) + short(b"x-consistent-hash") + bytes([0b10 if put else 0b11]) + long(b"")
    call(1, (40, 10), b"\x00\x00" + exchange, (40, 11))
    if put:
        # A quorum queue younger than a second when its only node is killed never answers again, and what it confirmed
        # is lost (4.0.5: the node writes its list of queues late). What is published after that second is safe.
        time.sleep(2)
        call(1, (85, 10), b"\x00", (85, 11))
        frame(1, 1, struct.pack(">HH", 60, 40) + b"\x00\x00" + short(b"") + short(NAME) + b"\x00")
        frame(2, 1, struct.pack(">HHQHB", 60, 0, 1, 1 << 12, 2))
        frame(3, 1, b"x")
        answer((60, 80))
        return 1
    # It is not acknowledged, so it goes back when the connection closes. An empty queue answers otherwise.
    call(1, (60, 70), b"\x00\x00" + short(NAME) + b"\x00", (60, 71))
    return 1


# --- Kafka: a topic ------------------------------------------------------------------------------------------------


def kafka(put, port):
    wire = connect(port).makefile("rwb")
    name = struct.pack(">H", len(NAME)) + NAME

    def call(key, version, body):
        wire.write(long(struct.pack(">HHIh", key, version, 7, -1) + body))
        wire.flush()
        return wire.read(struct.unpack(">I", wire.read(4))[0])

    if put:
        topic = name + struct.pack(">IHII", 1, 1, 0, 0)
        created = call(19, 2, struct.pack(">I", 1) + topic + struct.pack(">IB", 10_000, 0))
        assert struct.unpack(">h", created[12 + len(name):][:2]) == (0,), created
    found = call(3, 4, struct.pack(">I", 1) + name + b"\x00")
    # The error code stands before the name.
    return int(found[found.index(name) - 2:].startswith(b"\x00\x00"))


action, broker, port = sys.argv[1:]
kept = {"nats": nats, "rabbitmq": rabbitmq, "kafka": kafka}[broker](action == "put", int(port))
sys.exit(0 if kept == 1 else f"{broker} has lost what was stored: {kept}")
