"""What the store nodes agree on, kept by etcd: a small client of its JSON gateway, with TLS both ways.

Values are JSON. `read` and `swap` answer with everything below a prefix: {key: (value, revision)}. Only `swap` decides
anything: it changes a key if nobody has changed it since it was read, and says whether it did.
"""

import base64
import http.client
import json
import ssl
import time

PORT = 2379
TLS = "/etc/ssl/posthouse"


class NoQuorum(Exception):
    """No member answered in time, or none that has a majority behind it. What was asked may have happened or not."""


class Quorum:
    """A connection to whichever member answers, those named first preferred."""

    def __init__(self, addresses):
        self.addresses = list(addresses)
        self._tls = ssl.create_default_context(cafile=f"{TLS}/ca.pem")
        self._tls.load_cert_chain(f"{TLS}/node.pem", f"{TLS}/node.key")
        self._connection = None

    def read(self, prefix, seconds):
        """Everything below a prefix. Raises NoQuorum."""
        return _found(self._call("kv/range", _below(prefix), seconds))

    def swap(self, key, revision, value, prefix, seconds):
        """Sets a key if it is still at `revision` (0: if it is not there): (whether it was, all below the prefix)."""
        look = {"request_range": _below(prefix)}
        answer = self._call(
            "kv/txn",
            {
                "compare": [
                    {"key": _b64(key), "target": "MOD", "result": "EQUAL", "mod_revision": str(revision)},
                ],
                "success": [{"request_put": {"key": _b64(key), "value": _b64(json.dumps(value))}}, look],
                "failure": [look],
            },
            seconds,
        )
        return answer.get("succeeded", False), _found(answer["responses"][-1]["response_range"])

    def put(self, key, value, seconds):
        """Sets a key that only one node ever sets. Raises NoQuorum."""
        self._call("kv/put", {"key": _b64(key), "value": _b64(json.dumps(value))}, seconds)

    def close(self):
        """Ends the connection; the next call makes a new one."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _call(self, path, body, seconds):
        deadline = time.monotonic() + seconds
        reason = "no time"
        while (left := deadline - time.monotonic()) > 0:
            try:
                return self._post(path, body, left)
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = f"{self.addresses[0]}: {error or type(error).__name__}"
                self.close()
                self.addresses.append(self.addresses.pop(0))
                time.sleep(min(0.05, max(0, deadline - time.monotonic())))
        raise NoQuorum(reason)

    def _post(self, path, body, seconds):
        # One that hangs is given half of the time, so that there is some left for another.
        limit = max(0.1, seconds / 2) if len(self.addresses) > 1 else seconds
        if self._connection is None:
            self._connection = http.client.HTTPSConnection(self.addresses[0], PORT, timeout=limit, context=self._tls)
            self._connection.connect()
        self._connection.sock.settimeout(limit)
        self._connection.request("POST", f"/v3/{path}", json.dumps(body), {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise ValueError(f"{answer.status} {text.decode(errors='replace').strip()[:200]}")
        return json.loads(text)


def _b64(text):
    return base64.b64encode(text.encode()).decode()


def _below(prefix):
    end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
    return {"key": _b64(prefix), "range_end": _b64(end)}


def _found(answer):
    return {
        base64.b64decode(kv["key"]).decode(): (json.loads(base64.b64decode(kv["value"])), int(kv["mod_revision"]))
        for kv in answer.get("kvs", [])
    }
