"""Measurements (`loraplex bench`): steps in process, load over HTTP, and the bars of both."""
