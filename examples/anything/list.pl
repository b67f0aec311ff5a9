# An agent without an SDK: it serves HTTP on 127.0.0.1:8080, and keeps what it is told in /state.
# Plain Perl, as each Debian has it.
use strict;
use warnings;
use IO::Socket::INET;

my $server = IO::Socket::INET->new(
    LocalAddr => '127.0.0.1', LocalPort => 8080, Listen => 16, ReuseAddr => 1,
) or die "can't listen: $@\n";

while (my $client = $server->accept) {
    my ($length, $user) = (0, 'you');
    my $request = <$client> or next;    # the node looks whether we are there
    while (my $line = <$client>) {
        $line =~ s/\r?\n//;
        last if $line eq '';
        $length = $1 if $line =~ /^Content-Length:\s*(\d+)/i;
        $user   = $1 if $line =~ /^Roost-User:\s*(\S+)/i;
    }
    read $client, my $message, $length;

    open my $list, '+>>', '/state/list' or die "can't open the list: $!\n";
    print $list "$message\n" if $message ne 'list';
    seek $list, 0, 0;
    my @items = <$list>;
    close $list or die "can't write the list: $!\n";    # a full disk ends the turn, and changes nothing

    my $reply = "$user, your list has " . @items . " items:\n" . join '', map { "- $_" } @items;
    print $client "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\n",
        "Content-Length: ", length $reply, "\r\nConnection: close\r\n\r\n", $reply;
    close $client;
}
