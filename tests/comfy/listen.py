"""Run by ComfyUI's Python: listen to a server's messages, a line each on standard output, until a graph has ended.

Arguments: the server's address, a client's name. Pictures are told by their length.
"""

from __future__ import annotations

import asyncio
import json
import sys


async def listen(address: str, client: str) -> None:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.ws_connect(f"ws://{address}/ws?clientId={client}") as socket:
        print(json.dumps({"type": "listening"}), flush=True)
        async for message in socket:
            if message.type == aiohttp.WSMsgType.BINARY:
                print(json.dumps({"type": "picture", "bytes": len(message.data)}), flush=True)
            elif message.type == aiohttp.WSMsgType.TEXT:
                told = json.loads(message.data)
                print(json.dumps(told), flush=True)
                if told["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    return


if __name__ == "__main__":
    asyncio.run(listen(sys.argv[1], sys.argv[2]))
