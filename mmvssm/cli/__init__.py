"""The command line: what the tools do around training, inference and export. Nothing imports it but tools."""
