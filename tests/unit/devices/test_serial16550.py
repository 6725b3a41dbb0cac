"""The UART as a guest and a host see it; the interrupt line is a latch that remembers one edge."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.devices.serial16550 import (
    FCR_CLEAR_RECEIVE,
    FCR_ENABLE,
    IER,
    IER_LINE,
    IER_MODEM,
    IER_RECEIVE,
    IER_TRANSMIT,
    IIR_FCR,
    IIR_LINE,
    IIR_MODEM,
    IIR_NONE,
    IIR_RECEIVE,
    IIR_TIMEOUT,
    IIR_TRANSMIT,
    LCR,
    LCR_DLAB,
    LSR,
    LSR_OVERRUN,
    LSR_READY,
    MCR,
    MCR_LOOP,
    MCR_OUT2,
    MSR,
    RBR_THR,
    SCR,
    Serial16550,
)


class Uart:
    """A UART, what came out of it, and how it signalled."""

    def __init__(self) -> None:
        self.printed = bytearray()
        self.edges = 0
        self.rooms = 0
        self.device = Serial16550(self.printed.extend, self._edge, self._room)

    def _edge(self) -> None:
        self.edges += 1

    def _room(self) -> None:
        self.rooms += 1

    def get(self, register: int) -> int:
        return self.device.read(register, 1)

    def put(self, register: int, value: int) -> None:
        self.device.write(register, 1, value)

    def cause(self) -> int:
        return self.get(IIR_FCR) & 0x0F

    def edges_from(self, register: int, value: int | None = None) -> int:
        before = self.edges
        if value is None:
            self.get(register)
        else:
            self.put(register, value)
        return self.edges - before


@pytest.fixture
def uart() -> Uart:
    """Of a guest that listens: it has enabled the receive interrupt once."""
    uart = Uart()
    uart.put(MCR, MCR_OUT2)
    uart.put(IER, IER_RECEIVE)
    uart.put(IER, 0)
    uart.put(MCR, 0)
    return uart


def test_uart_transmit_reaches_output_and_stays_empty(uart: Uart) -> None:
    for byte in b"hello":
        uart.put(RBR_THR, byte)

    assert uart.printed == b"hello"
    assert uart.get(LSR) == 0x60


def test_uart_write_bytes_prints_in_one_go_with_one_edge(uart: Uart) -> None:
    uart.put(IER, IER_TRANSMIT)
    uart.get(IIR_FCR)
    before = uart.edges

    uart.device.write_bytes(b"a long line\n")

    assert uart.printed == b"a long line\n"
    assert uart.edges - before == 1


def test_uart_write_bytes_with_dlab_sets_divisor_and_prints_nothing(uart: Uart) -> None:
    uart.put(LCR, LCR_DLAB)

    uart.device.write_bytes(b"\x01\x02")

    assert uart.printed == b""
    assert uart.get(RBR_THR) == 2


def test_uart_autoconfig_of_linux_finds_a_16550a(uart: Uart) -> None:
    """The steps of Linux's autoconfig() and autoconfig_16550a(), reads and writes alike."""
    uart.put(IER, 0)
    assert uart.get(IER) & 0x0F == 0
    uart.put(IER, 0x0F)
    assert uart.get(IER) & 0x0F == 0x0F
    uart.put(IER, 0)
    uart.put(MCR, MCR_LOOP | 0x0A)
    assert uart.get(MSR) & 0xF0 == 0x90
    uart.put(MCR, 0)
    uart.put(LCR, 0xBF)
    uart.put(IIR_FCR, 0)
    uart.put(LCR, 0)
    uart.put(IIR_FCR, FCR_ENABLE)
    assert uart.get(IIR_FCR) >> 6 == 3  # 16550A
    uart.put(LCR, LCR_DLAB)
    assert uart.get(IIR_FCR) != 0  # no extended feature register: not a 16650
    uart.put(LCR, 0)
    uart.put(IIR_FCR, FCR_ENABLE | 0x20)
    assert uart.get(IIR_FCR) >> 5 == 6  # no 64-byte FIFO: not a 16750
    uart.put(IER, 0x40)
    assert uart.get(IER) & 0x40 == 0  # no UART unit enable: not an XScale
    for value in (0x55, 0xAA):
        uart.put(SCR, value)
        assert uart.get(SCR) == value


def test_uart_divisor_latch_hides_data_and_ier(uart: Uart) -> None:
    uart.put(IER, IER_RECEIVE)
    uart.put(LCR, LCR_DLAB | 3)
    uart.put(RBR_THR, 0x34)
    uart.put(IER, 0x12)

    assert (uart.get(RBR_THR), uart.get(IER)) == (0x34, 0x12)
    uart.put(LCR, 3)
    assert (uart.get(RBR_THR), uart.get(IER)) == (0, IER_RECEIVE)
    assert uart.printed == b""


def test_uart_enabling_transmit_interrupt_when_empty_raises_it_each_time(uart: Uart) -> None:
    """Linux takes the absence of this for a broken UART (UART_BUG_TXEN, UART_BUG_THRE)."""
    for _ in range(2):
        assert uart.edges_from(IER, IER_TRANSMIT) == 1
        assert uart.cause() == IIR_TRANSMIT
        assert uart.cause() == IIR_NONE
        uart.put(IER, 0)


def test_uart_sixteen_bytes_in_a_row_send_one_edge(uart: Uart) -> None:
    uart.put(IER, IER_TRANSMIT)
    uart.get(IIR_FCR)
    before = uart.edges

    for byte in range(16):
        uart.put(RBR_THR, byte)

    assert uart.edges - before == 1


def test_uart_holds_input_until_the_receive_interrupt_reaches_the_guest() -> None:
    uart = Uart()
    assert uart.device.receive(b"abc") == 0
    uart.put(IER, 0x0F)  # Linux' look at what the port is
    assert not uart.device.can_receive()
    uart.put(IER, 0)
    uart.put(MCR, MCR_OUT2)
    assert uart.rooms == 0

    uart.put(IER, IER_RECEIVE)

    assert uart.rooms == 1
    assert uart.device.receive(b"abc") == 1
    uart.put(IIR_FCR, FCR_ENABLE)
    assert uart.device.receive(b"bc") == 2
    assert bytes(uart.get(RBR_THR) for _ in range(3)) == b"abc"


def test_uart_listens_on_while_output_masks_its_interrupts() -> None:
    uart = Uart()
    uart.put(MCR, MCR_OUT2)
    uart.put(IER, IER_RECEIVE)

    uart.put(IER, 0)

    assert uart.device.can_receive()


def test_uart_gives_input_to_a_guest_that_polls_for_it() -> None:
    uart = Uart()
    assert uart.device.receive(b"a") == 0
    for _ in range(1000):
        uart.get(LSR)
        uart.put(RBR_THR, ord("."))
    assert uart.rooms == 0

    polls = 0
    while uart.rooms == 0:
        uart.get(LSR)
        polls += 1

    assert 8 < polls < 100
    assert uart.device.receive(b"a") == 1
    assert uart.get(LSR) & LSR_READY


def test_uart_receive_without_fifo_takes_one_byte(uart: Uart) -> None:
    assert uart.device.receive(b"abc") == 1
    assert not uart.device.can_receive()
    assert uart.get(RBR_THR) == ord("a")
    assert uart.device.can_receive()


def test_uart_receive_with_fifo_takes_sixteen_and_calls_room_once_when_drained(uart: Uart) -> None:
    uart.put(IIR_FCR, FCR_ENABLE)

    assert uart.device.receive(bytes(range(20))) == 16
    assert uart.device.receive(b"x") == 0
    got = [uart.get(RBR_THR) for _ in range(15)]
    assert uart.rooms == 0
    got.append(uart.get(RBR_THR))

    assert got == list(range(16))
    assert uart.rooms == 1
    assert uart.get(LSR) & LSR_READY == 0


def test_uart_room_is_not_called_when_everything_fitted(uart: Uart) -> None:
    uart.put(IIR_FCR, FCR_ENABLE)
    uart.device.receive(b"abc")

    for _ in range(3):
        uart.get(RBR_THR)

    assert uart.rooms == 0


def test_uart_can_receive_refusal_is_followed_by_room(uart: Uart) -> None:
    uart.device.receive(b"a")
    assert not uart.device.can_receive()

    uart.get(RBR_THR)

    assert uart.rooms == 1


def test_uart_clearing_the_fifo_drops_input_and_calls_room(uart: Uart) -> None:
    uart.put(IIR_FCR, FCR_ENABLE)
    uart.device.receive(bytes(17))

    uart.put(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE)

    assert uart.rooms == 1
    assert uart.get(LSR) & LSR_READY == 0


def test_uart_trigger_level_decides_between_data_and_timeout(uart: Uart) -> None:
    uart.put(IIR_FCR, FCR_ENABLE | 0x40)  # trigger at 4
    uart.put(IER, IER_RECEIVE)

    uart.device.receive(b"abc")
    assert uart.cause() == IIR_TIMEOUT
    uart.device.receive(b"d")
    assert uart.cause() == IIR_RECEIVE


def test_uart_causes_appear_in_order_of_priority(uart: Uart) -> None:
    uart.put(MCR, MCR_LOOP)  # modem lines fall: a status change
    uart.put(IER, IER_RECEIVE | IER_TRANSMIT | IER_LINE | IER_MODEM)
    uart.put(RBR_THR, 1)
    uart.put(RBR_THR, 2)  # no FIFO: overrun

    assert uart.cause() == IIR_LINE
    assert uart.get(LSR) & LSR_OVERRUN
    assert uart.cause() == IIR_RECEIVE
    assert uart.get(RBR_THR) == 1
    assert uart.cause() == IIR_TRANSMIT
    assert uart.cause() == IIR_MODEM
    assert uart.get(MSR) & 0x0F != 0
    assert uart.cause() == IIR_NONE
    assert uart.printed == b""


def test_uart_serving_one_cause_sends_an_edge_for_the_next(uart: Uart) -> None:
    uart.put(IIR_FCR, FCR_ENABLE)
    uart.put(IER, IER_RECEIVE | IER_TRANSMIT)
    uart.device.receive(b"ab")

    assert uart.edges_from(RBR_THR) == 1  # "b" is left
    assert uart.edges_from(RBR_THR) == 1  # the transmitter is left
    assert uart.edges_from(IIR_FCR) == 0  # acknowledged, nothing left


def test_uart_clearing_the_fifo_sends_an_edge_for_the_transmitter(uart: Uart) -> None:
    uart.put(IIR_FCR, FCR_ENABLE)
    uart.put(IER, IER_RECEIVE | IER_TRANSMIT)
    uart.device.receive(b"ab")

    assert uart.edges_from(IIR_FCR, FCR_ENABLE | FCR_CLEAR_RECEIVE) == 1
    assert uart.cause() == IIR_TRANSMIT


def test_uart_loopback_cuts_off_the_host(uart: Uart) -> None:
    uart.put(MCR, MCR_LOOP)
    assert uart.device.receive(b"a") == 0

    uart.put(MCR, 0)

    assert uart.rooms == 1
    assert uart.device.receive(b"a") == 1


def test_uart_wide_access_covers_neighbouring_registers(uart: Uart) -> None:
    uart.device.write(SCR, 2, 0x1234)
    uart.device.write(RBR_THR, 4, 0x0300_0041)

    assert uart.printed == b"A"
    assert uart.device.read(SCR, 4) == 0xFFFF_FF34
    assert uart.get(LCR) == 3


ACTIONS = st.one_of(
    st.tuples(st.just("read"), st.integers(0, 7), st.just(0)),
    st.tuples(st.just("write"), st.integers(0, 7), st.integers(0, 255)),
    st.tuples(st.just("host"), st.integers(0, 20), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACTIONS, max_size=40))
def test_uart_after_any_history_a_one_cause_handler_sees_every_byte(
    actions: list[tuple[str, int, int]],
) -> None:
    """Whatever a guest did before: every byte and every transmit event comes without polling."""
    uart = Uart()
    for what, where, value in actions:
        if what == "read":
            uart.get(where)
        elif what == "write":
            uart.put(where, value)
        else:
            uart.device.receive(bytes(where))
    for register, value in ((LCR, 3), (MCR, MCR_OUT2), (IER, 0), (IIR_FCR, FCR_ENABLE | 2)):
        uart.put(register, value)
    uart.get(LSR)
    uart.get(MSR)

    served = uart.edges  # the latch is empty, the driver is set up: from here on, edges only
    uart.put(IER, 0x0F)
    waiting, got, sent = b"some input, more than a FIFO holds", bytearray(), 0
    start = len(uart.printed)
    waiting = waiting[uart.device.receive(waiting) :]
    while uart.edges != served:
        served = uart.edges
        cause = uart.cause()
        if cause in (IIR_RECEIVE, IIR_TIMEOUT):
            got.append(uart.get(RBR_THR))
            waiting = waiting[uart.device.receive(waiting) :]
        elif cause == IIR_TRANSMIT and sent < 5:
            uart.put(RBR_THR, sent)
            sent += 1

    assert got == b"some input, more than a FIFO holds"
    assert uart.printed[start:] == bytes(range(5))


def test_uart_acknowledging_the_transmitter_sends_an_edge_for_the_modem(uart: Uart) -> None:
    uart.put(IER, IER_TRANSMIT | IER_MODEM)
    uart.put(MCR, MCR_LOOP)

    assert uart.edges_from(IIR_FCR) == 1
    assert uart.cause() == IIR_MODEM


def test_uart_host_input_sends_an_edge_to_an_idle_guest(uart: Uart) -> None:
    uart.put(IIR_FCR, FCR_ENABLE)
    uart.put(IER, IER_RECEIVE)

    for sent, data in enumerate((b"a", b"bc", b"d"), start=1):
        uart.device.receive(data)
        assert uart.edges == sent
    uart.device.receive(b"")
    assert uart.edges == 3


def test_uart_host_input_is_silent_while_its_interrupt_is_off(uart: Uart) -> None:
    uart.device.receive(b"a")

    assert uart.edges == 0
    assert uart.edges_from(IER, IER_RECEIVE) == 1
