//! Keys and values of the tokens read so far, in memory with room for those to come.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// Tokens for which there is room at least.
const ROOM: usize = 64;

/// The keys and values of the tokens seen so far, one pair per layer, each `[batch, kv_heads, seq, head_dim]`.
///
/// A layer has room for more tokens than it holds, so that a step writes its own keys and values and copies no others. The room is
/// doubled when it is full.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    layers: Vec<Layer>,
}

/// `[keys, values]`, each `[batch, kv_heads, room, head_dim]`.
#[derive(Clone, Debug)]
struct Layer {
    held: [Held; 2],
    len: usize,
}

/// A tensor that can be written to in place: taken out, so that nothing else holds it.
#[derive(Clone, Debug)]
struct Held(Option<Tensor<4>>);

impl Held {
    fn get(&self) -> &Tensor<4> {
        self.0.as_ref().expect("it is put back at once")
    }

    fn change(&mut self, f: impl FnOnce(Tensor<4>) -> Tensor<4>) {
        self.0 = self.0.take().map(f);
    }
}

/// The same tensor with this room, the values at the beginning.
fn with_room(x: Tensor<4>, len: usize, room: usize) -> Tensor<4> {
    let [batch, heads, _, width] = x.dims();
    let options = (&x.device(), x.dtype());
    let y = Tensor::zeros([batch, heads, room, width], options);
    let x = x.narrow(2, 0, len);
    y.slice_assign([0..batch, 0..heads, 0..len, 0..width], x)
}

impl KvCache {
    /// Appends the keys and values of `layer` and returns all of them. Layers come in order.
    pub fn append(
        &mut self,
        layer: usize,
        key: Tensor<4>,
        value: Tensor<4>,
    ) -> (Tensor<4>, Tensor<4>) {
        let [batch, heads, seq, width] = key.dims();
        let Some(own) = self.layers.get_mut(layer) else {
            self.layers.push(Layer {
                held: [&key, &value].map(|x| Held(Some(x.clone()))),
                len: seq,
            });
            return (key, value);
        };
        let len = own.len + seq;
        let [key, value] = [key, value];
        for (held, new) in own.held.iter_mut().zip([key, value]) {
            let room = held.get().dims()[2];
            if room < len {
                held.change(|x| with_room(x, own.len, len.max(2 * room).next_multiple_of(ROOM)));
            }
            let place = [0..batch, 0..heads, own.len..len, 0..width];
            held.change(|x| x.slice_assign(place, new));
        }
        own.len = len;
        let [keys, values] = [0, 1].map(|part| own.held[part].get().clone().narrow(2, 0, len));
        (keys, values)
    }

    /// Number of tokens seen so far, padding included.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.len)
    }

    /// Whether no token was seen yet.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// From one row that holds sequences of these lengths one after another to `copies` rows for each, on the left of which nothing is
    /// seen: `[Σ lens]` to `[lens · copies, longest]`.
    pub fn spread(&mut self, lens: &[usize], copies: usize) {
        let longest = lens.iter().copied().max().unwrap_or(0);
        let rows = lens.len() * copies;
        for layer in &mut self.layers {
            for held in &mut layer.held {
                held.change(|x| {
                    let [_, heads, _, width] = x.dims();
                    let room = (longest + 1).next_multiple_of(ROOM);
                    let shape = [rows, heads, room, width];
                    let mut y = Tensor::zeros(shape, (&x.device(), x.dtype()));
                    let mut start = 0;
                    for (index, &len) in lens.iter().enumerate() {
                        let own = x.clone().narrow(2, start, len);
                        let first = index * copies;
                        let place = [
                            first..first + copies,
                            0..heads,
                            longest - len..longest,
                            0..width,
                        ];
                        y = y.slice_assign(place, own.expand([copies, heads, len, width]));
                        start += len;
                    }
                    y
                });
            }
            layer.len = longest;
        }
    }

    /// Keeps these rows alone.
    pub fn keep(&mut self, rows: &[usize], device: &Device) {
        let rows: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let count = rows.len();
        let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [count]), device);
        for held in self.layers.iter_mut().flat_map(|layer| &mut layer.held) {
            held.change(|x| x.select(0, rows.clone()));
        }
    }
}
