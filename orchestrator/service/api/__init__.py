"""The API: what a running vmfleece says and does when it is asked, on its control socket and by TCP.

base        what the API asks of the service (contract)
routes      what can be asked, as a table
openapi     the description made from it               [pure]
guard       who may ask what
token       the token that changing calls by TCP need
connection  deadlines, and a limit
unix        the control socket
pages       the status page's files
stream      server-sent events
server      the listeners, and what every request goes through
"""
