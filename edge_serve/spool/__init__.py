"""The spool: results that wait on disk for an upstream that is down.

One SQLite database for each state folder, `<state_dir>/spool/spool.db`, with a lane for each sink (its rows are what waits
for that sink, in order); large bodies lie beside it in append-only files. Nothing here touches the disk, nor imports
SQLite, before the first result has to wait.

    clock     how old a row is, across boots of a board without a clock
    segments  append-only files of large bodies
    store     the database: tables, transactions, policies; one thread
    rescue    what is done about a damaged database
    lane      one sink's results, as its runner sees them
    spooler   the thread between the two
    look      what `edge-serve spool` reads, beside a running service
"""
