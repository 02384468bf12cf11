"""The web page (NiceGUI)."""
