"""The command line: parse, call, print."""
import sys
import typer
from ..errors import RankgateError
from . import drain, replay, serve
app = typer.Typer()
app.command("drain")(drain.command)
app.command("replay")(replay.command)
app.command("serve")(serve.command)
def main() -> None:
    try:
        app()
    except RankgateError as error:
        sys.stderr.write(str(error) + "\n")
        sys.exit(error.exit_code)
