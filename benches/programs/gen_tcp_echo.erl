%% Echo of frames with two bytes of length on gen_tcp: a process for each connection, {packet, 2}.
%% Prints its address, and ends when its standard input closes.
-module(gen_tcp_echo).
-export([start/0]).

%% Frames that a connection's process takes before it asks the socket for more.
-define(ACTIVE, 100).

start() ->
    Options = [binary, {packet, 2}, {active, false}, {nodelay, true}, {backlog, 1024},
               {ip, {127, 0, 0, 1}}],
    {ok, Listener} = gen_tcp:listen(0, Options),
    {ok, Port} = inet:port(Listener),
    spawn(fun() -> accept(Listener) end),
    io:format("127.0.0.1:~b~n", [Port]),
    eof = io:get_line(""),
    halt().

accept(Listener) ->
    {ok, Socket} = gen_tcp:accept(Listener),
    spawn(fun() -> accept(Listener) end),
    ok = inet:setopts(Socket, [{active, ?ACTIVE}]),
    echo(Socket).

echo(Socket) ->
    receive
        {tcp, Socket, Frame} ->
            ok = gen_tcp:send(Socket, Frame),
            echo(Socket);
        {tcp_passive, Socket} ->
            ok = inet:setopts(Socket, [{active, ?ACTIVE}]),
            echo(Socket);
        {tcp_closed, Socket} ->
            ok;
        {tcp_error, Socket, _Reason} ->
            ok
    end.
