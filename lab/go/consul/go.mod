module pyinfra-hashistack/lab/go/consul

go 1.16

require github.com/hashicorp/consul v1.14.11
