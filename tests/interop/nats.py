"""A CloudEvents client that knows nothing of Tidings: nats-py and the `cloudevents` package of PyPI.

Publishes an event in binary and one in structured mode to the subject of a topic, and reads what a Tidings service
publishes for each. Run by `scripts/interop nats`; TIDINGS_URL says where.
"""

import asyncio
import os

import nats
from cloudevents.core.bindings import http
from cloudevents.core.v1.event import CloudEvent

# The package has no binding for NATS. That of HTTP has the same headers and the same percent-encoding; the
# one difference is where the content type of the data stands.
CONTENT_TYPE = ("content-type", "ce-datacontenttype")


def binary(event):
    message = http.to_binary_event(event)
    headers = dict(message.headers)
    headers[CONTENT_TYPE[1]] = headers.pop(CONTENT_TYPE[0])
    return headers, message.body


def structured(event):
    message = http.to_structured_event(event)
    return dict(message.headers), message.body


def read(message):
    headers = {name.lower(): value for name, value in message.headers.items()}
    headers[CONTENT_TYPE[0]] = headers.pop(CONTENT_TYPE[1])
    return http.from_binary_event(http.HTTPMessage(headers=headers, body=message.data))


def same(what, found, expected):
    if found != expected:
        raise SystemExit(f"error: {what} is {found!r}, not {expected!r}")


async def main():
    client = await nats.connect(os.environ["TIDINGS_URL"])
    answers = await client.subscribe("interop.answered")
    stream = client.jetstream()
    for mode in (structured, binary):
        name = "Zoë \U0001f600 100 %"
        attributes = {
            "id": f"{mode.__name__}-1",
            "source": "/python/Euro € 😀",
            "type": "interop.greeted",
            "subject": 'a "quoted" %25 subject',
            "datacontenttype": "application/json",
            "partitionkey": "k é 1",
        }
        headers, body = mode(CloudEvent(attributes, {"name": name}))
        await stream.publish("interop.greeted", body, headers=headers)
        event = read(await answers.next_msg(timeout=30))
        same("the type", event.get_type(), "interop.answered")
        same("the source", event.get_source(), "/interop")
        same("the content type", event.get_datacontenttype(), "application/json")
        same("the key of the answer", event.get_extension("partitionkey"), name)
        same("the cause", event.get_extension("causationid"), attributes["id"])
        expected = {"name": name, "id": attributes["id"], "source": attributes["source"]}
        expected |= {"subject": attributes["subject"], "key": attributes["partitionkey"]}
        same("the data", event.get_data(), expected)
        print(f"{mode.__name__} mode: read by Tidings; its answer {event.get_id()} of {event.get_time()} read by cloudevents")
    await client.close()


asyncio.run(main())
