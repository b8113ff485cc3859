"""Every connection to the service is opened here, so that all of them are alike."""

from __future__ import annotations

import grpc

from embedding_service.security.access import Access

# Rows come in messages larger than gRPC's 4 MB default. The server's own limits bound them. Addresses may change behind
# a name (a restarted pod), so connecting again must not back off for minutes.
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # also how long an attempt to connect may take
    # A shard that came back gets its rows within a second or so. By then all should be able to ask it.
    ("grpc.max_reconnect_backoff_ms", 500),
    # A replaced pod has its old name and a new address. Look it up again at once, not every 30 s.
    ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    # A peer that hangs or was cut off does not close its connection. Pings while calls wait find out.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # The service is reached directly. http_proxy, https_proxy and grpc_proxy are for the web.
    ("grpc.enable_http_proxy", 0),
]


def open_channel(address: str, access: Access | None) -> grpc.Channel:
    """A channel for threads to host:port. It connects when it is first used.

    `access`: what it shows and believes. None: plain text. Raises InvalidRequest naming a file that cannot be read.
    """
    if access is None:
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.secure_channel(address, access.credentials(), options=CHANNEL_OPTIONS)


def open_channel_async(address: str, access: Access | None) -> grpc.aio.Channel:
    """A channel for the running event loop to host:port. It connects when it is first used. See `open_channel`."""
    if access is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    return grpc.aio.secure_channel(address, access.credentials(), options=CHANNEL_OPTIONS)
