"""The `lorax` command. stdout is data, stderr is talk; every command imports what it needs when it runs."""
