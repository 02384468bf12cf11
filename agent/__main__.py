"""The program. A spawned trainer imports this module again, so it imports nothing at its top."""


def main() -> None:
    """Run the command line."""
    import sys

    if sys.argv[1:] == ["start"]:
        from agent.cli_start import main as start

        start()
    else:
        from agent.cli import main as command_line

        command_line()


if __name__ == "__main__":
    main()
