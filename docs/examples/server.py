import hotport


async def echo(stream):  # an anyio byte stream
    async for chunk in stream:
        await stream.send(chunk)


if __name__ == "__main__":
    hotport.run(echo, bind="tcp://127.0.0.1:7000", workers=2)
